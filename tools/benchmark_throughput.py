#!/usr/bin/env python3
"""Measure throughput on this machine.

Example:

    python tools/benchmark_throughput.py train --model qwen2.5-vl-7b

Every command warms up, repeats its measurement and prints medians with their range; --json FILE also writes the result
to a file. Temporary files, such as random weights, go to $TMPDIR.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: measure a single thread by default

warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")  # while megatron-core is imported
warnings.filterwarnings("ignore", message=".*tp_group is None")  # from calls inside megatron-core

from command_line import HelpFormatter, run_tool, tool_parser  # noqa: E402
from throughput import convert, decode, rollout, step, sweep, sync, train  # noqa: E402

from megatron_vcr1.model import cpu  # noqa: E402

COMMANDS = (train, rollout, step, decode, sync, convert, sweep)


def build_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for module in COMMANDS:
        command = commands.add_parser(
            module.__name__.rpartition(".")[2],
            help=module.HELP,
            description=module.__doc__,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.add_argument("--json", type=Path, metavar="FILE", help="also write the result to a JSON file")
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(arguments)
    args.arguments = arguments
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    cpu.install()
    return run_tool("benchmark_throughput", lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())
