"""What people are told of a run: its report, its status, its forecast, and the command that resumes it."""
