"""The commands of benchmark_throughput.py: one module each, with `HELP`, `add_arguments(parser)` and `run(args)`."""
