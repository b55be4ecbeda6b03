"""What can be submitted to a Ray cluster; each module is a command: `python -m jobs.segment --help`."""
