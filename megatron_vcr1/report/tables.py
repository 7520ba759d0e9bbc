"""The numbers of a report as rows: key figures, reasons of zeros, seconds by phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vcr1.report.charts import short
from megatron_vcr1.report.curves import MIN_PHASE_SHARE, phases
from megatron_vcr1.report.run_record import RunRecord

MAX_REASONS = 20
"""Rows of the table of zeros; the rest is counted."""


@dataclass(frozen=True, slots=True)
class ZeroRow:
    """How often a part of the reward was 0 for one reason; the rates are counts a step."""

    run: str
    task: str
    part: str
    reason: str
    count: int
    first_rate: float
    last_rate: float


@dataclass(frozen=True)
class PhaseRow:
    """Mean seconds of a step of one run, by phase, with the share of the total; 'other' is what no phase covers."""

    run: str
    total_s: float
    phases: Sequence[tuple[str, float, float]]


def zero_rows(runs: Sequence[RunRecord]) -> list[ZeroRow]:
    """Reasons of zeros, the most frequent first; the rates are of the first and the last quarter of the steps."""
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
    """Where the time of a mean step went, for each run that timed its phases."""
    rows = []
    for run in runs:
        columns = run.metrics.columns
        seconds = {phase: float(np.nansum(columns[f"time/{phase}_s"])) / len(run.metrics) for phase in phases(run)}
        if not seconds:
            continue
        total_s = sum(seconds.values())
        if (whole := columns.get("time/total_s")) is not None:
            total_s = max(float(np.nansum(whole)) / len(run.metrics), total_s)
            if (rest := total_s - sum(seconds.values())) > MIN_PHASE_SHARE * total_s:
                seconds["other"] = rest
        shares = [(phase, value, value / total_s) for phase, value in seconds.items()]
        rows.append(PhaseRow(run.name, total_s, shares))
    return rows


def key_figures(run: RunRecord) -> list[tuple[str, str]]:
    """What to know of a run at a glance: (name, value)."""
    figures: list[tuple[str, str]] = []
    if steps := run.metrics.steps.tolist():
        planned = run.setting("train", "num_steps")
        figures.append(("Steps", f"{steps[-1]}" + (f" of {planned}" if planned else "")))
    columns = run.metrics.columns
    if (reward := columns.get("reward/total")) is not None:
        figures.append(("Reward, first and last tenth", f"{_tenth(reward, 0)} → {_tenth(reward, -1)}"))
    elif (loss := columns.get("loss")) is not None:
        figures.append(("Loss, first and last tenth", f"{_tenth(loss, 0)} → {_tenth(loss, -1)}"))
    for key, name, unit in (
        ("response_tokens/mean", "Tokens of a response", ""),
        ("time/total_s", "Time of a step", " s"),
        ("tokens_per_s", "Tokens a second", ""),
        ("mfu", "MFU", ""),
        ("memory/peak_gb", "Peak memory", " GB"),
    ):
        if (values := columns.get(key)) is not None and np.isfinite(values).any():
            value = np.nanmax(values) if key.startswith("memory") else np.nanmedian(values)
            figures.append((name, f"{value:.1%}" if key == "mfu" else short(float(value)) + unit))
    if run.skipped:
        figures.append(("Samples skipped", f"{len(run.skipped)}"))
    return figures


def settings_that_differ(runs: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Keys of config.toml that the runs set differently, with each run's value; the run's own folder aside."""
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
    """Mean of the finite values in the first (0) or the last (-1) tenth."""
    finite = values[np.isfinite(values)]
    count = max(len(finite) // 10, 1)
    return short(float((finite[:count] if which == 0 else finite[-count:]).mean())) if len(finite) else "-"


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)
