"""Rows of the report's tables: key metrics, reasons for zero rewards, seconds per phase, differing settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vcr1.report.charts import short
from megatron_vcr1.report.curves import MIN_PHASE_FRACTION, phases
from megatron_vcr1.report.run_record import RunRecord

MAX_REASONS = 20
"""Maximum number of rows of the table of zero rewards; further reasons are only counted."""


@dataclass(frozen=True, slots=True)
class ZeroRow:
    """The number of zeros of a part of the reward for one reason; the rates are zeros per step."""

    run: str
    task: str
    part: str
    reason: str
    count: int
    first_rate: float
    last_rate: float


@dataclass(frozen=True)
class PhaseRow:
    """Mean seconds of a step of one run: (phase, seconds, fraction of the total); 'other' is not covered by a phase."""

    run: str
    total_s: float
    phases: Sequence[tuple[str, float, float]]


def zero_rows(runs: Sequence[RunRecord]) -> list[ZeroRow]:
    """Return the reasons for zero rewards, the most frequent first.

    The rates are those of the first and of the last quarter of the steps.
    """
    rows = []
    for run in runs:
        quarter = max(len(run.metrics) // 4, 1)
        for key, values in run.metrics.columns.items():
            if key.startswith("zero_rewards/") and key.count("/") >= 3:
                _, task, part, reason = key.split("/", 3)
                counts = np.nan_to_num(values)
                first, last = float(counts[:quarter].mean()), float(counts[-quarter:].mean())
                rows.append(ZeroRow(run.name, task, part, reason, int(counts.sum()), first, last))
    return sorted(rows, key=lambda row: -row.count)


def phase_rows(runs: Sequence[RunRecord]) -> list[PhaseRow]:
    """Return the mean time of each phase, for each run that timed its phases."""
    rows = []
    for run in runs:
        columns = run.metrics.columns
        num_steps = max(int((run.metrics.steps > 0).sum()), 1)  # row 0 is the validation of the initial model
        seconds = {phase: float(np.nansum(columns[f"time/{phase}_s"])) / num_steps for phase in phases(run)}
        if not seconds:
            continue
        total_s = sum(seconds.values())
        if (whole := columns.get("time/total_s")) is not None:
            # The total of a step does not include the checkpoint and the validation after it.
            outside_s = seconds.get("save", 0.0) + seconds.get("validation", 0.0)
            total_s = max(float(np.nansum(whole)) / num_steps + outside_s, total_s)
            if (rest := total_s - sum(seconds.values())) > MIN_PHASE_FRACTION * total_s:
                seconds["other"] = rest
        fractions = [(phase, value, value / total_s) for phase, value in seconds.items()]
        rows.append(PhaseRow(run.name, total_s, fractions))
    return rows


def key_metrics(run: RunRecord) -> list[tuple[str, str]]:
    """Return a run's most important numbers: (name, value)."""
    metrics: list[tuple[str, str]] = []
    if steps := run.metrics.steps.tolist():
        planned = run.setting("train", "num_steps")
        metrics.append(("Steps", f"{steps[-1]}" + (f" of {planned}" if planned else "")))
    columns = run.metrics.columns
    if (reward := columns.get("reward/total")) is not None:
        metrics.append(("Reward, first → last 10 % of steps", f"{_tenth(reward, 0)} → {_tenth(reward, -1)}"))
    elif (loss := columns.get("loss")) is not None:
        metrics.append(("Loss, first → last 10 % of steps", f"{_tenth(loss, 0)} → {_tenth(loss, -1)}"))
    for key, name, unit in (
        ("response_tokens/mean", "Tokens per response", ""),
        ("time/total_s", "Time per step", " s"),
        ("tokens_per_s", "Tokens per second", ""),
        ("mfu", "MFU", ""),
        ("memory/peak_gb", "Peak memory", " GB"),
    ):
        if (values := columns.get(key)) is not None and np.isfinite(values).any():
            value = np.nanmax(values) if key.startswith("memory") else np.nanmedian(values)
            metrics.append((name, f"{value:.1%}" if key == "mfu" else short(float(value)) + unit))
    if run.skipped:
        metrics.append(("Samples skipped", f"{len(run.skipped)}"))
    return metrics


def settings_that_differ(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Return the keys of config.toml that differ between the runs, with each run's value, except for train.run_dir."""
    flat = [
        {
            f"{section}.{key}": value
            for section, table in run.config.items()
            if isinstance(table, dict)
            for key, value in table.items()
        }
        for run in runs
    ]
    keys = sorted(set().union(*flat) - {"train.run_dir"}) if flat else []
    values = {key: [_shown(settings.get(key)) for settings in flat] for key in keys}
    return {key: shown for key, shown in values.items() if len(set(shown)) > 1}


def _tenth(values: NDArray[np.float64], which: int) -> str:
    """Return the mean of the finite values in the first (0) or the last (-1) tenth."""
    finite = values[np.isfinite(values)]
    count = max(len(finite) // 10, 1)
    return short(float((finite[:count] if which == 0 else finite[-count:]).mean())) if len(finite) else "-"


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)
