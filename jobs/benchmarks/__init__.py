"""What `python -m jobs.benchmark` measures: a module for each of its subcommands, and what they share."""
