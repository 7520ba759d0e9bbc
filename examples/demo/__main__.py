"""`bash tools/demo.sh`: videos, a tiny model, SFT and GRPO, evaluation, export and a report, on a CPU."""

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
from megatron_vcr1.cli.arguments import positive

MEASURED = Path(__file__).with_name("measured.json")
"""report.json of the run that the README quotes."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/demo.sh",
        description="The whole job in miniature, on a CPU: synthesizes videos, builds a tiny Qwen2.5-VL, trains a base "
        "model, fine-tunes it by SFT and by GRPO on one task and on three, tests every model, exports, compares the "
        "export with transformers, and writes report.html and report.json. Started again, it goes on where it was.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--seeds", type=_seeds, default=(0, 1), metavar="N,N", help="seeds of training; default: 0,1 (as reported)"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="processes of one thread; default: one a core, up to 8"
    )
    parser.add_argument("--real", type=Path, metavar="VIDEO", help="ask the trained model about a clip of your own")
    parser.add_argument("--ask", default="red square", metavar="THING", help="with --real; default: %(default)s")
    return parser


def _seeds(text: str) -> tuple[int, ...]:
    seeds = tuple(dict.fromkeys(int(seed) for seed in text.split(",")))
    if not seeds or min(seeds) < 0:
        raise argparse.ArgumentTypeError(f"{text}: name seeds from 0, as 0,1")
    return seeds


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    demo = Demo(args.out, args.seeds, args.quick)
    workers = args.workers or min(len(os.sched_getaffinity(0)), 8)
    record = Record(demo.out)
    console = Console(width=None if sys.stdout.isatty() else 140)  # a table in a log file needs room
    if args.real is not None:
        warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")  # megatron-core, module by module
        return _real(demo, args.real, args.ask, console)
    if not record.is_of(demo.recipe()):
        print(
            f"demo: {demo.out} holds results of another demo (with or without --quick, or of another version): remove "
            "it, or name another folder with --out",
            file=sys.stderr,
        )
        return 2
    announce(demo, workers, console)
    jobs = demo.jobs()
    try:
        run_jobs(jobs, record, workers)
    except JobFailed as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    show(demo, record.spent(jobs), record.calls(), workers, console)
    return 0


def show(
    demo: Demo, spent: dict[str, dict[str, float]], calls: list[float], num_workers: int, console: Console
) -> None:
    """Print the tables, and keep what they say in report.json."""
    from demo.results import collect, print_results

    results = collect(demo, spent, calls, num_workers)
    path = demo.out / "report.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print_results(results, console)
    if demo.quick:
        console.print("--quick: a few steps of everything, so that these figures tell only that it runs")
    console.print(f"{demo.out / 'report.html'} shows curves, and samples with their frames; numbers: {path}")


def _real(demo: Demo, video: Path, thing: str, console: Console) -> int:
    from demo.real import ask
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


def announce(demo: Demo, workers: int, console: Console) -> None:
    """What is to come: the result of an earlier run."""
    from demo.results import print_results

    if MEASURED.exists() and not demo.quick:
        console.print("[bold]What an earlier run measured; this one makes the same again[/]")
        print_results(json.loads(MEASURED.read_text(encoding="utf-8")), console)
    console.print(f"Working in {demo.out}, {workers} processes of one thread; logs: {demo.out / 'logs'}")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
