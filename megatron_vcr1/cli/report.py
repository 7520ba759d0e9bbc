"""Defines the arguments of `vcr1 report`; `megatron_vcr1.report` does the work."""

from __future__ import annotations

import argparse
import sys

from megatron_vcr1.cli.arguments import not_negative, path_argument
from megatron_vcr1.errors import UserError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `report` to the `vcr1` command."""
    parser = subparsers.add_parser(
        "report",
        help="write a page about one or several runs: results, curves, samples with frames",
        description="Write one self-contained HTML page about a run, or about several runs, compared with the first: "
        "evaluation results, learning curves, reasons for zero rewards, time per phase, and samples with their "
        "frames. The page opens without a network and contains no scripts.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="+", type=path_argument, metavar="RUN_DIR", help="folder of a run (train.run_dir)"
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="FILE",
        help="the page (default: report.html in RUN_DIR, paper.html with --layout paper; required for several runs)",
    )
    parser.add_argument(
        "--layout",
        choices=("run", "paper"),
        default="run",
        help="run: all results, curves and samples; paper: the results as the tables of the VideoChat-R1 paper "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--published", action="store_true", help="with --layout paper, also show the numbers that the paper prints"
    )
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="also write the page's numbers as JSON")
    parser.add_argument(
        "--max-samples",
        type=not_negative,
        default=36,
        metavar="N",
        help="samples in the gallery, each with up to 8 frames; 0: no gallery (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the page. Raises UserError for a folder that holds no run."""
    from megatron_vcr1.report.page import write_report
    from megatron_vcr1.report.paper_page import write_paper_report
    from megatron_vcr1.report.run_record import read_runs

    if args.out is None and len(args.runs) > 1:
        raise UserError("several runs have no common folder for the page; name one with --out FILE")
    is_paper = args.layout == "paper"
    if args.published and not is_paper:
        raise UserError("--published needs --layout paper")
    out = args.out or args.runs[0] / ("paper.html" if is_paper else "report.html")
    runs = read_runs(args.runs)
    if is_paper:
        report = write_paper_report(runs, out, published=args.published, json_path=args.json)
    else:
        report = write_report(runs, out, max_samples=args.max_samples, json_path=args.json)
    for note in report.notes:
        print(f"note: {note}", file=sys.stderr)
    samples = "" if is_paper else f", {report.num_samples} samples"
    print(f"{out}: {report.num_bytes / 1e6:.1f} MB{samples}")
    return 0
