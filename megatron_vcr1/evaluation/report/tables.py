"""The numbers of a report as rows: evaluation results, reasons of zeros, seconds by phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vcr1.evaluation.report.charts import short
from megatron_vcr1.evaluation.report.curves import phases
from megatron_vcr1.evaluation.report.run_record import Estimate, EvaluationResult, RunRecord

MAX_COLUMNS = 14
"""Of the table of all benchmarks, unless there are more benchmarks than that."""

MAX_REASONS = 40
"""Rows of the table of zeros; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One metric of one model, and how far it is from the first row's."""

    estimate: Estimate
    num_samples: int
    delta: float | None
    apart: bool
    """Its interval and the first row's do not overlap."""
    best: bool
    """The largest of its column, where they differ."""


@dataclass(frozen=True)
class ResultRow:
    """A model of a run: its cells by (label, metric)."""

    run: str
    model: str
    cells: dict[tuple[str, str], Cell]


@dataclass(frozen=True)
class ResultTable:
    """Models against benchmarks, as the paper's table 1.

    Attributes:
        columns: label of the benchmark to its metrics.
        main: the same with each benchmark's first metrics, as many as fit side by side.
        captions: what a label stands for, where its name does not say it.
    """

    columns: dict[str, list[str]]
    main: dict[str, list[str]]
    captions: dict[str, str]
    rows: Sequence[ResultRow]


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


def result_table(runs: Sequence[RunRecord]) -> ResultTable:
    """Every evaluation of every run; a run that evaluated several models has a row for each."""
    columns: dict[str, list[str]] = {}
    captions: dict[str, str] = {}
    estimates: dict[tuple[int, str], dict[tuple[str, str], tuple[Estimate, int]]] = {}
    for number, run in enumerate(runs):
        for result in run.evaluations:
            metrics = columns.setdefault(result.label, [])
            metrics.extend(metric for metric in result.metrics if metric not in metrics)
            captions.setdefault(result.label, _caption(result))
            row = estimates.setdefault((number, result.model), {})
            for metric, estimate in result.metrics.items():
                row[result.label, metric] = (estimate, result.num_samples)
    first = next(iter(estimates.values()), {})
    rows = [
        ResultRow(runs[number].name, model, {key: _cell(key, row, first, list(estimates.values())) for key in row})
        for (number, model), row in estimates.items()
    ]
    return ResultTable(columns, _main_columns(columns), captions, rows)


def result_json(table: ResultTable) -> list[dict[str, Any]]:
    """The table's numbers, one object a model and metric."""
    return [
        {
            "run": row.run,
            "model": row.model,
            "label": label,
            "metric": metric,
            "value": cell.estimate.value,
            "low": cell.estimate.low,
            "high": cell.estimate.high,
            "num_samples": cell.num_samples,
            "delta": cell.delta,
        }
        for row in table.rows
        for (label, metric), cell in row.cells.items()
    ]


def zero_rows(runs: Sequence[RunRecord]) -> list[ZeroRow]:
    """Reasons of zeros, the most frequent first; the rates are of the first and the last quarter of the steps."""
    rows = []
    for run in runs:
        quarter = max(len(run.metrics) // 4, 1)
        for key, values in run.metrics.columns.items():
            if key.startswith("zeros/") and key.count("/") >= 3:
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
            seconds["other"] = total_s - sum(seconds.values())
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


def _main_columns(columns: dict[str, list[str]]) -> dict[str, list[str]]:
    most = max(map(len, columns.values()), default=1)
    fitting = [
        number for number in range(1, most + 1) if sum(min(number, len(one)) for one in columns.values()) <= MAX_COLUMNS
    ]
    return {label: metrics[: max(fitting, default=1)] for label, metrics in columns.items()}


def _caption(result: EvaluationResult) -> str:
    """What a label does not say: the benchmark, whether the model was asked to think, and who judged."""
    judge = result.details.get("judge")
    texts = (
        result.benchmark if result.benchmark != result.label else "",
        "" if result.thinking is None else "thinking" if result.thinking else "no thinking",
        f"judged by {judge}" if judge else "",
    )
    return ", ".join(text for text in texts if text)


def _cell(
    key: tuple[str, str],
    row: dict[tuple[str, str], tuple[Estimate, int]],
    first: dict[tuple[str, str], tuple[Estimate, int]],
    everything: Sequence[dict[tuple[str, str], tuple[Estimate, int]]],
) -> Cell:
    estimate, num_samples = row[key]
    base = first[key][0] if key in first and first is not row else None
    others = [other[key][0].value for other in everything if key in other]
    return Cell(
        estimate,
        num_samples,
        delta=estimate.value - base.value if base else None,
        apart=base is not None and _apart(estimate, base),
        best=min(others) < estimate.value == max(others),
    )


def _apart(one: Estimate, other: Estimate) -> bool:
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return False
    return one.low > other.high or one.high < other.low


def _tenth(values: NDArray[np.float64], which: int) -> str:
    """Mean of the finite values in the first (0) or the last (-1) tenth."""
    finite = values[np.isfinite(values)]
    count = max(len(finite) // 10, 1)
    return short(float((finite[:count] if which == 0 else finite[-count:]).mean())) if len(finite) else "-"


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)
