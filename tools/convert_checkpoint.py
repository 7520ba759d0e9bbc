#!/usr/bin/env python3
"""Convert checkpoints: the same as `vcr1 convert`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_vcr1.cli.main import main as vcr1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments and return its exit code."""
    return vcr1(["convert", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
