"""Defines the arguments of `vcr1 status`; `megatron_vcr1.report.status` does the work."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from megatron_vcr1.cli.arguments import path_argument

if TYPE_CHECKING:  # `vcr1 --help` must not load numpy
    from megatron_vcr1.report.status import RunStatus


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `status` to the `vcr1` command."""
    parser = subparsers.add_parser(
        "status",
        help="show a run's step, time left, checkpoints and best metric, and whether its process lives",
        description="Show a run's step, the time that is left, its newest checkpoint, its best validation metric, and "
        "whether its process lives, also if it runs on another host that shares the file system.",
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", type=path_argument, metavar="RUN_DIR", help="folder of a run (train.run_dir)")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the status. Raises UserError for a folder that holds no run."""
    from megatron_vcr1.report.status import read_status

    status = read_status(args.run_dir)
    print(json.dumps(status.as_json(), indent=1) if args.json else "\n".join(_lines(status)))
    return 0


def _lines(status: RunStatus) -> Iterator[str]:
    where = f" ({status.host}, process {status.pid})" if status.pid is not None else f" ({status.host})"
    yield f"{status.path}: {status.stage.upper()}, {status.process}{where if status.process != 'not running' else ''}"
    planned = f" of {status.num_steps}" if status.num_steps is not None else ""
    planned += ", stopped early" if status.stopped_early else ""
    newest = "no step yet" if status.idle_s is None else f"newest record {_duration(status.idle_s)} ago"
    yield f"step        {status.step}{planned}; {newest}"
    if status.eta_s and status.seconds_per_step is not None:
        yield f"time left   {_duration(status.eta_s)}, at {status.seconds_per_step:.3g} s per step"
    if status.checkpoints:
        others = ", ".join(map(str, status.checkpoints[:-1]))
        yield f"checkpoint  step {status.checkpoints[-1]}" + (f" (also {others})" if others else "")
    else:
        yield "checkpoint  none yet"
    if status.last is not None:
        best = "" if status.best is None else f"; best {status.best[1]:.4g} at step {status.best[0]}"
        yield f"validation  {status.metric} {status.last[1]:.4g} at step {status.last[0]}{best}"
    if status.num_skipped:
        yield f"skipped     {status.num_skipped} samples, see skipped.jsonl"
    for note in status.notes:
        yield f"note        {note}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
