#!/usr/bin/env python3
"""Measure throughput on this machine.

    python tools/benchmark_throughput.py train --model qwen2.5-vl-7b

Every command warms up, repeats, prints medians with their range, and writes JSON with --json FILE.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: figures of one thread, unless asked otherwise

warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")  # said while megatron-core is imported
warnings.filterwarnings("ignore", message=".*tp_group is None")  # megatron-core's own calls

from throughput import convert, decode, rollout, step, sweep, sync, train  # noqa: E402

from megatron_vcr1.errors import UserError  # noqa: E402
from megatron_vcr1.model import cpu  # noqa: E402

COMMANDS = (train, rollout, step, decode, sync, convert, sweep)


def main(argv: Sequence[str] | None = None) -> int:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    arguments = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(arguments)
    args.arguments = arguments
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    cpu.install()
    try:
        return args.run(args)
    except UserError as error:
        print(f"benchmark_throughput: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmark_throughput: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
