"""The subcommands of benchmark_throughput.py, one module each with `add_parser(subparsers)` and `run(args)`."""
