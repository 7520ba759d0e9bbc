"""The measurements of `vcr1 benchmark`: one module each, with `HELP`, `add_arguments(parser)` and `run(args)`."""
