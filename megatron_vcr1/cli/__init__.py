"""The `vcr1` command: one module for each subcommand, named after it."""
