"""The `vcr1` command: one module per subcommand, named after it.

A module parses arguments, loads settings, calls one function of the package and returns the exit code.
"""
