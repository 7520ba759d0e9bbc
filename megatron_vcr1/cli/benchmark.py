"""`vcr1 benchmark`: measures throughput on this machine. `megatron_vcr1.throughput` does the work."""

from __future__ import annotations

import argparse
import os
import warnings

from megatron_vcr1.cli.arguments import path_argument
from megatron_vcr1.command_line import HelpFormatter

_DESCRIPTION = """Measure throughput on this machine.

    vcr1 benchmark train --model qwen2.5-vl-7b

Every command repeats its measurement and prints medians; --json FILE also writes the result, with the command line and
the machine, to a file. Temporary files, such as random weights, go to $TMPDIR."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `benchmark` to the `vcr1` command.

    The arguments of its commands need torch, which `vcr1 --help` should not wait for, so `run` parses them.
    """
    parser = subparsers.add_parser(
        "benchmark",
        help="measure throughput on this machine",
        description=_DESCRIPTION,
        formatter_class=HelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, help="a command and its options; see vcr1 benchmark --help")
    parser.set_defaults(run=run, takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Measure. Raises UserError for invalid input."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: measure a single thread by default
    warnings.filterwarnings("ignore", message=".*tp_group is None")  # from calls inside megatron-core
    from megatron_vcr1.model import cpu

    words = [*args.words, *args.overrides]
    parsed = build_parser().parse_args(words)
    parsed.arguments = words
    cpu.install()
    return parsed.run(parsed)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all measurements."""
    from megatron_vcr1.throughput import convert, decode, rollout, step, sweep, sync, train

    parser = argparse.ArgumentParser(
        prog="vcr1 benchmark", description=_DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in (train, rollout, step, decode, sync, convert, sweep):
        command = commands.add_parser(
            module.__name__.rpartition(".")[2],
            help=module.HELP,
            description=module.__doc__,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.add_argument("--json", type=path_argument, metavar="FILE", help="also write the result to a JSON file")
        command.set_defaults(run=module.run)
    return parser
