"""`vcr1 report`: arguments here, work in the other modules of this package."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_vcr1.errors import UserError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "report",
        help="one page about one or several runs: results, curves, samples with frames",
        description="Write one self-contained HTML page about a run, or about several side by side, the first being "
        "what the others are compared with: evaluation results, learning curves, why answers earned nothing, where the "
        "time went, and samples with their frames. It needs no network to open, and holds no scripts.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN_DIR", help="folder of a run (train.run_dir)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: RUN_DIR/report.html; needed where several runs are given"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the page's numbers as JSON")
    parser.add_argument(
        "--max-samples",
        type=_not_negative,
        default=36,
        metavar="N",
        help="samples in the gallery, each with up to 8 frames; 0: no gallery (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def run(args: argparse.Namespace) -> int:
    from megatron_vcr1.report.page import write_report
    from megatron_vcr1.report.run_record import read_runs

    if args.out is None and len(args.runs) > 1:
        raise UserError("several runs share no folder: say where the page goes with --out FILE")
    out = args.out or args.runs[0] / "report.html"
    report = write_report(read_runs(args.runs), out, max_samples=args.max_samples, json_path=args.json)
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{out}: {report.num_bytes / 1e6:.1f} MB, {report.num_samples} samples")
    return 0
