"""Evaluation results as tables: one row per model, one group of columns per benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_vcr1.evaluation.benchmarks import BENCHMARKS
from megatron_vcr1.report.charts import words
from megatron_vcr1.report.run_record import Estimate, EvaluationResult, RunRecord

MAX_COLUMNS = 14
"""Maximum number of columns of the main table, unless there are more benchmarks than that."""

_HOW = {True: "thinking", False: "answering", None: ""}


@dataclass(frozen=True, slots=True)
class Cell:
    """One metric of one model, and its difference from the first row."""

    estimate: Estimate
    num_samples: int
    how: str
    """Whether the model was asked to think first or to answer at once; empty if unknown."""
    delta: float | None
    apart: bool
    """True if its interval and the interval of the first row do not overlap."""
    best: bool
    """True if it is the largest value of its column and the values differ."""


@dataclass(frozen=True)
class ResultRow:
    """A model that a run evaluated, with its cells by (label, metric).

    Attributes:
        own: whether the model is the only one that the run evaluated and is stored in the run's folder.
    """

    run: str
    model: str
    own: bool
    cells: Mapping[tuple[str, str], Cell]

    @property
    def labels(self) -> set[str]:
        """Labels of the benchmarks that the model was evaluated on."""
        return {label for label, _ in self.cells}


@dataclass(frozen=True)
class ResultTable:
    """A table of models and benchmarks, like table 1 of the paper.

    Attributes:
        columns: for each label of a benchmark, its metrics.
        captions: explanation of a label, if its name is not enough.
        mixed: labels with results both with and without thinking, so that each cell states which.
    """

    columns: Mapping[str, Sequence[str]]
    captions: Mapping[str, str]
    mixed: frozenset[str]
    rows: Sequence[ResultRow]


def result_table(runs: Sequence[RunRecord]) -> ResultTable:
    """Return the table of all results; a run that evaluated several models has one row per model."""
    return _table(runs, [(number, result) for number, run in enumerate(runs) for result in run.evaluations])


def main_table(runs: Sequence[RunRecord]) -> ResultTable:
    """Return the table with one group of columns per benchmark, and as many first metrics as fit side by side.

    If a model was evaluated on the same samples with and without thinking, the table shows the better result by the
    first metric.
    """
    columns = _benchmark_columns([result for run in runs for result in run.evaluations])
    by_column: dict[tuple[int, str, str], list[EvaluationResult]] = {}
    for number, run in enumerate(runs):
        for result in run.evaluations:
            by_column.setdefault((number, result.model, columns[result.label]), []).append(result)
    better = [
        (number, replace(max(results, key=_first_value), label=column))
        for (number, _, column), results in by_column.items()
    ]
    table = _table(runs, better)
    most = max(map(len, table.columns.values()), default=1)
    widths = [sum(min(number, len(metrics)) for metrics in table.columns.values()) for number in range(1, most + 1)]
    fitting = max(sum(width <= MAX_COLUMNS for width in widths), 1)
    return replace(table, columns={label: metrics[:fitting] for label, metrics in table.columns.items()})


def result_json(table: ResultTable) -> list[dict[str, Any]]:
    """Return the table's numbers, one object per model and metric."""
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


def num_answers_and_samples(runs: Sequence[RunRecord]) -> tuple[int, int]:
    """Return the number of answers that all results are based on, and of samples: those of a manifest by task."""
    num_answers, num_samples = 0, dict[object, int]()
    for run in runs:
        for result in run.evaluations:
            num_answers += result.num_samples
            benchmark = BENCHMARKS.get(result.benchmark)
            task = result.benchmark if benchmark is None else benchmark.task
            test = (result.details.get("manifest") or result.label, task)
            num_samples[test] = max(num_samples.get(test, 0), result.num_samples)
    return num_answers, sum(num_samples.values())


def _table(runs: Sequence[RunRecord], results: Sequence[tuple[int, EvaluationResult]]) -> ResultTable:
    """Build a table of results, each given with the index of its run."""
    columns: dict[str, list[str]] = {}
    by_label: dict[str, list[EvaluationResult]] = {}
    by_row: dict[tuple[int, str], dict[tuple[str, str], EvaluationResult]] = {}
    for number, result in results:
        metrics = columns.setdefault(result.label, [])
        metrics.extend(metric for metric in result.metrics if metric not in metrics)
        by_label.setdefault(result.label, []).append(result)
        by_row.setdefault((number, result.model), {}).update({(result.label, name): result for name in result.metrics})
    rows = list(by_row.values())
    num_models = [sum(number == index for index, _ in by_row) for number in range(len(runs))]
    return ResultTable(
        columns,
        {label: _caption(labelled) for label, labelled in by_label.items()},
        frozenset(label for label, labelled in by_label.items() if len({result.thinking for result in labelled}) > 1),
        [
            ResultRow(
                runs[number].name,
                model,
                own=num_models[number] == 1 and Path(model).absolute().is_relative_to(runs[number].path.absolute()),
                cells={key: _cell(key, row, rows) for key in row},
            )
            for (number, model), row in by_row.items()
        ],
    )


def _benchmark_columns(results: Sequence[EvaluationResult]) -> dict[str, str]:
    """Map labels to columns: two labels of the same samples, with and without thinking, share the shorter label."""
    labels: dict[tuple[object, ...], dict[bool | None, set[str]]] = {}
    for result in results:
        test = (result.benchmark, result.details.get("manifest"), result.details.get("judge"))
        if result.details.get("manifest"):
            labels.setdefault(test, {}).setdefault(result.thinking, set()).add(result.label)
    columns = {result.label: result.label for result in results}
    for ways in labels.values():
        if ways.keys() == {True, False} and all(len(way_labels) == 1 for way_labels in ways.values()):
            pair = set.union(*ways.values())
            columns |= dict.fromkeys(pair, min(pair, key=lambda label: (len(label), label)))
    return columns


def _first_value(result: EvaluationResult) -> float:
    return next(iter(result.metrics.values())).value


def _caption(results: Sequence[EvaluationResult]) -> str:
    """Describe the results of a label as far as the label does not: benchmark, judge, and thinking or answering."""
    benchmarks = dict.fromkeys(
        words(result.benchmark) for result in results if not result.label.startswith(result.benchmark)
    )
    ways = {result.thinking for result in results}
    judges = dict.fromkeys(str(judge) for result in results if (judge := result.details.get("judge")))
    how = _HOW[results[0].thinking] if len(ways) == 1 else ""
    if how in results[0].label:
        how = ""
    return ", ".join(text for text in (*benchmarks, how, *(f"judged by {judge}" for judge in judges)) if text)


def _cell(
    key: tuple[str, str],
    row: Mapping[tuple[str, str], EvaluationResult],
    rows: Sequence[Mapping[tuple[str, str], EvaluationResult]],
) -> Cell:
    _, metric = key
    estimate, first = row[key].metrics[metric], rows[0]
    base = first[key].metrics[metric] if key in first and first is not row else None
    values = [other[key].metrics[metric].value for other in rows if key in other]
    return Cell(
        estimate,
        row[key].num_samples,
        _HOW[row[key].thinking],
        delta=estimate.value - base.value if base else None,
        apart=base is not None and _apart(estimate, base),
        best=min(values) < estimate.value == max(values),
    )


def _apart(first: Estimate, second: Estimate) -> bool:
    """Return whether two intervals do not overlap."""
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return False
    return first.low > second.high or first.high < second.low
