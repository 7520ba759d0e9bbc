#!/usr/bin/env python3
"""Predict memory, time and cost of a run on a cluster: the same as `vcr1 plan`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_vcr1.cli.main import main as vcr1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments and return its exit code."""
    return vcr1(["plan", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
