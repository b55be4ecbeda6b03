"""The measurements of `python -m jobs.benchmark`: one module per subcommand, and the modules that they share."""
