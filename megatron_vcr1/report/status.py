"""The status of a run: its step, the time that is left, its checkpoints, and whether its process lives."""

from __future__ import annotations

import fcntl
import os
import platform
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vcr1.checkpoint.run_lock import LOCK_FILE
from megatron_vcr1.checkpoint.step_dirs import saved_steps
from megatron_vcr1.errors import UserError
from megatron_vcr1.report.curves import VALIDATION
from megatron_vcr1.report.run_record import MetricTable, config_table, read_json_lines, read_metrics
from megatron_vcr1.text_files import read_toml

NUM_RECENT_STEPS = 20  # whose median duration the estimate uses
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, pid


@dataclass(frozen=True, slots=True)
class RunStatus:
    """The status of a run.

    Attributes:
        process: "running", "not running" or "unknown" (the file system has no locks).
        host, pid: where its newest start ran.
        step: steps done; 0 before the first.
        num_steps: planned length; None if it is not recorded.
        stopped_early: whether validation.patience has ended the run before that.
        idle_s: seconds since the newest record; None before the first.
        seconds_per_step: median of the newest steps; None before the first.
        eta_s: estimate of the seconds that are left; None if unknown.
        checkpoints: steps with a checkpoint.
        metric: the metric of checkpoint.keep_best, or else the first one of the validation; None without validation.
        best: step and value of its best validation, not counting the initial model.
        last: step and value of its newest validation.
        num_skipped: samples that could not be used.
        notes: what could not be read, or was repeated; the numbers above do without it.
    """

    path: str
    stage: str
    process: str
    host: str | None
    pid: int | None
    step: int
    num_steps: int | None
    stopped_early: bool
    idle_s: float | None
    seconds_per_step: float | None
    eta_s: float | None
    checkpoints: Sequence[int]
    metric: str | None
    best: tuple[int, float] | None
    last: tuple[int, float] | None
    num_skipped: int
    notes: Sequence[str]

    def as_json(self) -> dict[str, Any]:
        """Return the status as JSON values."""
        return asdict(self)


def read_status(path: Path) -> RunStatus:
    """Read the status of a run, which may be starting, running or finished.

    Raises:
        UserError: the folder holds no run.
    """
    problems: list[str] = []
    starts = list(read_json_lines(path / "starts.jsonl", problems))
    if not starts or not (path / "config.toml").exists():
        if (path / "checkpoints").is_dir():
            raise UserError(f"{path}: no run has started here yet: it is starting, or has failed before its first step")
        raise UserError(f"{path}: no run has started here; give the folder of a run (train.run_dir)")
    config = read_toml(path / "config.toml")
    metrics = read_metrics(path / "metrics.jsonl", problems)
    step = int(metrics.steps[-1]) if len(metrics) else int(starts[-1].get("step") or 0)
    num_steps = starts[-1].get("num_steps") or config_table(config, "train").get("num_steps")
    duration_s = _seconds_per_step(metrics)
    file = path / "metrics.jsonl"
    metric = _metric(config, metrics)
    values = metrics.columns.get(f"{VALIDATION}{metric}")
    pairs = [] if values is None else zip(metrics.steps.tolist(), values.tolist(), strict=True)
    measured = [(step, value) for step, value in pairs if np.isfinite(value)]
    trained = [pair for pair in measured if pair[0] > 0]
    best = max(trained, key=lambda pair: (pair[1], -pair[0])) if trained else None
    patience = config_table(config, "validation").get("patience")
    stopped_early = patience is not None and best is not None and sum(pair[0] > best[0] for pair in trained) >= patience
    num_left = 0 if stopped_early or num_steps is None else max(num_steps - step, 0)
    return RunStatus(
        path=str(path),
        stage=str(config_table(config, "train").get("stage", "run")),
        process=process_state(path / "checkpoints", starts[-1]),
        host=starts[-1].get("host"),
        pid=starts[-1].get("pid"),
        step=step,
        num_steps=num_steps,
        stopped_early=stopped_early,
        idle_s=time.time() - file.stat().st_mtime if len(metrics) else None,
        seconds_per_step=duration_s,
        eta_s=None if duration_s is None or num_steps is None else duration_s * num_left,
        checkpoints=saved_steps(path / "checkpoints"),
        metric=metric,
        best=best,
        last=measured[-1] if measured else None,
        num_skipped=len({str(row.get("id")) for row in read_json_lines(path / "skipped.jsonl", problems)}),
        notes=problems,
    )


def _seconds_per_step(metrics: MetricTable) -> float | None:
    """Return the median duration of the newest steps, with the mean share of validations and checkpoints."""
    totals = metrics.columns.get("time/total_s")
    if totals is None or not np.isfinite(totals).any():
        return None
    extra = [metrics.columns.get(f"time/{phase}_s") for phase in ("validation", "save")]
    num_steps = int(np.isfinite(totals).sum())
    shared = sum(float(np.nansum(column)) for column in extra if column is not None) / num_steps
    return float(np.median(totals[np.isfinite(totals)][-NUM_RECENT_STEPS:])) + shared


def _metric(config: Mapping[str, Any], metrics: MetricTable) -> str | None:
    keep_best = config_table(config, "checkpoint").get("keep_best")
    names = [key.removeprefix(VALIDATION) for key in metrics.columns if key.startswith(VALIDATION)]
    return keep_best or next((name for name in names if "/num_" not in name), None)


def process_state(checkpoints: Path, start: Mapping[str, Any]) -> str:
    """Return whether the run's process lives: "running", "not running" or "unknown".

    A running process holds the lock of the checkpoint directory (`checkpoint.run_lock`). Asking for the holder works on
    other hosts too, on file systems with locks, such as NFS, and does not take the lock. Do not call it in the run's
    own process: closing any descriptor of a file releases the locks that the process has on it.

    Args:
        start: the row of starts.jsonl of the newest start.
    """
    try:
        with (checkpoints / LOCK_FILE).open("rb") as file:
            query = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_ = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, query))
    except OSError:
        return _process_of_this_host(start)
    return "not running" if kind == fcntl.F_UNLCK else "running"


def _process_of_this_host(start: Mapping[str, Any]) -> str:
    """Ask this host for the process, where the file system has no locks."""
    if start.get("host") != platform.node() or not isinstance(start.get("pid"), int):
        return "unknown"
    return "running" if Path(f"/proc/{start['pid']}").exists() else "not running"
