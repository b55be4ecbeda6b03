"""Information about runs for people: the report, the status, the forecast, and the command that resumes a run."""
