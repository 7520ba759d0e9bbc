"""`bash tools/demo.sh`: synthetic videos, a tiny model, SFT and GRPO, evaluation, export and a report, on a CPU."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType

from rich.console import Console

from demo.jobs import JobFailed, Record, run_jobs
from demo.plan import Demo
from megatron_vcr1.cli.arguments import path_argument, positive

MEASURED = Path(__file__).with_name("measured.json")
"""report.json of the run that the README quotes."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/demo.sh",
        description="Run the whole pipeline on a tiny model, on a CPU: synthesize videos, build a tiny Qwen2.5-VL or "
        "Qwen3-VL, train a base model, fine-tune it with SFT and GRPO on one task and on three tasks, evaluate every "
        "model, export it, compare the export with transformers, and write report.html and report.json. Run the same "
        "command again to continue an interrupted demo.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        default=Path("runs/demo"),
        metavar="DIR",
        help="output directory (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=_seeds, default=(0, 1), metavar="N,N", help="training seeds (default: 0,1, as in the README)"
    )
    parser.add_argument(
        "--family",
        choices=("qwen2_5_vl", "qwen3_vl"),
        default="qwen2_5_vl",
        help="family of the tiny model (default: %(default)s, as in the README)",
    )
    parser.add_argument("--quick", action="store_true", help="run only a few steps of each job, as a smoke test")
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="single-threaded processes (default: one per core, at most 8)"
    )
    parser.add_argument(
        "--real", type=path_argument, metavar="VIDEO", help="ask the trained model about your own video"
    )
    parser.add_argument(
        "--ask", default="red square", metavar="THING", help="object to ask about with --real (default: %(default)s)"
    )
    return parser


def _seeds(text: str) -> tuple[int, ...]:
    seeds = tuple(dict.fromkeys(int(seed) for seed in text.split(",")))
    if min(seeds) < 0:
        raise argparse.ArgumentTypeError(f"{text}: seeds must be 0 or greater, for example 0,1")
    return seeds


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    demo = Demo(args.out, args.seeds, args.quick, args.family)
    num_workers = args.workers or min(len(os.sched_getaffinity(0)), 8)
    record = Record(demo.out)
    console = Console(width=None if sys.stdout.isatty() else 140)  # a log file has no width: leave room for the tables
    if args.real is not None:
        warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")  # from megatron-core's modules
        return _ask(demo, args.real, args.ask, console)
    if not record.matches(demo.fingerprint()):
        print(
            f"demo: {demo.out} holds results of another demo (with or without --quick, of another family or version). "
            "Delete the directory, or choose another one with --out",
            file=sys.stderr,
        )
        return 2
    announce(demo, num_workers, console)
    jobs = demo.jobs()
    try:
        run_jobs(jobs, record, num_workers)
    except JobFailed as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    report(demo, record, num_workers, console)
    return 0


def announce(demo: Demo, num_workers: int, console: Console) -> None:
    """Print the results of an earlier run, so that the reader knows what to expect, and where this run writes."""
    from demo.results import print_results

    if MEASURED.exists() and not demo.quick and demo.family == "qwen2_5_vl":
        console.print("[bold]Results of an earlier run; this run reproduces them[/]")
        print_results(json.loads(MEASURED.read_text(encoding="utf-8")), console)
    console.print(f"Working in {demo.out} with {num_workers} single-threaded processes; logs: {demo.out / 'logs'}")


def report(demo: Demo, record: Record, num_workers: int, console: Console) -> None:
    """Print the result tables and write them to report.json."""
    from demo.results import collect, print_results

    results = collect(demo, record.spent(demo.jobs()), record.call_seconds(), num_workers)
    path = demo.out / "report.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_results(results, console)
    if demo.quick:
        console.print("--quick ran only a few steps of each job: the numbers above show that it runs, nothing else")
    console.print(f"{demo.out / 'report.html'} shows curves and samples with their frames; numbers: {path}")


def _ask(demo: Demo, video: Path, thing: str, console: Console) -> int:
    from demo.ask import ask
    from megatron_vcr1.data.video import VideoError
    from megatron_vcr1.errors import UserError
    from megatron_vcr1.model import cpu

    cpu.install()
    try:
        ask(demo, video, thing, console)
    except (UserError, VideoError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
