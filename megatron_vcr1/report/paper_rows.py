"""Rows of the paper's tables from the results of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vcr1.errors import UserError
from megatron_vcr1.report.paper_tables import ANSWER, GLUE, TABLES, THINK, Column, PaperTable, Prompt, Training
from megatron_vcr1.report.run_record import Estimate, EvaluationResult, RunRecord, config_table
from megatron_vcr1.text_files import parse_json, read_lines, read_toml


@dataclass(frozen=True, slots=True)
class PaperCell:
    """A metric, and its difference from the baseline, the model that the training started from.

    Attributes:
        estimate: the metric.
        num_samples: number of samples of the benchmark.
        delta: difference from the baseline's result with the same test prompt, or else with another one; None if the
            baseline has no result.
    """

    estimate: Estimate
    num_samples: int
    delta: float | None


@dataclass(frozen=True, slots=True)
class PaperRow:
    """A model and a test prompt, with a cell (or None) for each column of the table.

    Attributes:
        run: name of the run that holds the results.
        model: path of the model.
        training: how the model was trained; None for a model that was not trained here, and if it is not known.
        is_untrained: whether the model was not trained here.
        test_prompt: what the test prompts asked for.
    """

    run: str
    model: str
    training: Training | None
    is_untrained: bool
    test_prompt: Prompt
    cells: tuple[PaperCell | None, ...]


@dataclass(frozen=True, slots=True)
class _Result:
    """A result with its run and its model's training, as `PaperRow` describes it."""

    run: str
    result: EvaluationResult
    training: Training | None
    is_untrained: bool

    @property
    def with_glue(self) -> bool:
        """Whether the prompts asked for time spans beside the option."""
        asked = {self.result.details.get("prompt"), self.result.benchmark}
        return not asked.isdisjoint(("grounded_qa", "nextgqa"))


def paper_rows(runs: Sequence[RunRecord]) -> dict[int, list[PaperRow]]:
    """Return the rows of each table by its number, the models that were not trained here first.

    A trained model is in the tables that compare models like it. If no table does, it is in every table that it has
    results for.
    """
    results = [_Result(run.name, result, *_training(run, result)) for run in runs for result in run.evaluations]
    return {table.number: _rows(table, [result for result in results if _belongs(result, table)]) for table in TABLES}


def rows_json(rows: Mapping[int, Sequence[PaperRow]]) -> list[dict[str, Any]]:
    """Return the rows for other programs, one object per table."""
    return [
        {
            "table": table.number,
            "title": table.title,
            "rows": [
                {
                    "run": row.run,
                    "model": row.model,
                    "is_untrained": row.is_untrained,
                    "stage": row.training.stage if row.training else None,
                    "training_prompt": row.training.prompt if row.training else None,
                    "test_prompt": row.test_prompt,
                    "cells": [
                        {
                            "benchmark": column.group,
                            "metric": column.title,
                            "value": cell.estimate.value,
                            "delta": cell.delta,
                        }
                        for column, cell in zip(table.columns, row.cells, strict=True)
                        if cell
                    ],
                }
                for row in rows[table.number]
            ],
        }
        for table in TABLES
    ]


def _belongs(result: _Result, table: PaperTable) -> bool:
    training = result.training
    if training is None or table.accepts(training):
        return True
    return not any(other.accepts(training) for other in TABLES)


def _rows(table: PaperTable, results: Sequence[_Result]) -> list[PaperRow]:
    by_row: dict[tuple[str, str, Prompt], list[_Result]] = {}
    for result in results:
        if any(_cell_matches(column, result, table) for column in table.columns):
            key = (result.run, result.result.model, _test_prompt(result, table))
            by_row.setdefault(key, []).append(result)
    estimates = {key: _estimates(table, found) for key, found in by_row.items()}
    models = list(dict.fromkeys(key[:2] for key in by_row))

    def place(item: tuple[tuple[str, str, Prompt], Sequence[_Result]]) -> tuple[bool, int, int]:
        """Order untrained models first, then models as given, then shorter prompts before longer ones."""
        key, found = item
        return not found[0].is_untrained, models.index(key[:2]), len(key[2])

    ordered = sorted(by_row.items(), key=place)
    return [
        PaperRow(
            *key[:2],
            found[0].training,
            found[0].is_untrained,
            key[2],
            _cells(table, found, _baseline(estimates, found[0].training, key[2])),
        )
        for key, found in ordered
    ]


def _baseline(
    estimates: Mapping[tuple[str, str, Prompt], Sequence[Estimate | None]], training: Training | None, prompt: Prompt
) -> list[Estimate | None]:
    """Return the baseline's estimate of each column: with the same test prompt if there is one, or the first."""
    of_base = [(key, found) for key, found in estimates.items() if training and is_base(key[1], training)]
    by_preference = sorted(of_base, key=lambda item: item[0][2] != prompt)
    columns = zip(*(estimates for _, estimates in by_preference), strict=True)
    return [next((estimate for estimate in column if estimate), None) for column in columns]


def _cells(
    table: PaperTable, results: Sequence[_Result], baseline: Sequence[Estimate | None] | None
) -> tuple[PaperCell | None, ...]:
    cells: list[PaperCell | None] = []
    for index, column in enumerate(table.columns):
        result = next((result for result in results if _cell_matches(column, result, table)), None)
        if result is None:
            cells.append(None)
            continue
        estimate = result.result.metrics[column.metric]
        base = baseline[index] if baseline else None  # without a baseline, the list is empty
        delta = estimate.value - base.value if base else None
        cells.append(PaperCell(estimate, result.result.num_samples, delta))
    return tuple(cells)


def _estimates(table: PaperTable, results: Sequence[_Result]) -> list[Estimate | None]:
    return [cell.estimate if cell else None for cell in _cells(table, results, None)]


def _cell_matches(column: Column, result: _Result, table: PaperTable) -> bool:
    """Return whether a result has the value of a column. With glue, only table 4 shows results of Video-MME."""
    if column.metric not in result.result.metrics:
        return False
    if result.with_glue and result.result.benchmark != "nextgqa" and not table.separates_glue:
        return False
    return result.result.benchmark in column.benchmarks or result.result.label in column.benchmarks


def _test_prompt(result: _Result, table: PaperTable) -> Prompt:
    parts = {
        THINK: result.result.thinking is True,
        ANSWER: True,
        GLUE: table.separates_glue and result.with_glue,
    }
    return tuple(part for part, is_asked in parts.items() if is_asked)


def is_base(model: str, training: Training) -> bool:
    """Return whether a model is the one that a training started from."""
    return bool(model and training.base) and Path(model).resolve() == Path(training.base).resolve()


def _training(run: RunRecord, result: EvaluationResult) -> tuple[Training | None, bool]:
    """Return how the model of a result was trained, and whether it was not trained here.

    A run that has metrics trained the models that are evaluated in its folder. Otherwise the evaluation has recorded
    the run.
    """
    if len(run.metrics):
        tasks = {key.split("/")[1] for key in run.metrics.columns if _is_task_reward(key)}
        return (_training_of(run.path, run.config, tasks) if run.config else None), False
    folder = result.details.get("training_run", "")  # null for a model that is in no run
    if not isinstance(folder, str) or not folder:
        return None, folder is None
    try:
        return _training_of(Path(folder), read_toml(Path(folder) / "config.toml"), set()), False
    except UserError:
        return None, False


def _is_task_reward(key: str) -> bool:
    return key.startswith("reward/") and key.count("/") == 2


def _training_of(run_dir: Path, config: Mapping[str, Any], rewarded_tasks: set[str]) -> Training:
    """Read a run's training from its settings.

    Args:
        run_dir: folder of the run.
        config: tables of its config.toml.
        rewarded_tasks: tasks that its metrics name, which are used if a manifest is not there any more.
    """
    train, data = config_table(config, "train"), config_table(config, "data")
    listed = data.get("sources")
    sources = [source for source in listed if isinstance(source, dict)] if isinstance(listed, list) else []
    tasks = {_first_task(Path(str(source.get("manifest", "")))) for source in sources}
    known = frozenset(task for task in tasks if task) if None not in tasks else frozenset(rewarded_tasks)
    thinking = {source.get("thinking") is not False for source in sources}
    num_epochs = train.get("num_epochs", 1.0)
    return Training(
        stage=str(train.get("stage", "grpo")),
        tasks=known,
        thinking=thinking.pop() if len(thinking) == 1 else None,
        num_epochs=num_epochs if isinstance(num_epochs, int | float) and not train.get("num_steps") else None,
        base=_base(run_dir, config),
    )


def _base(run_dir: Path, config: Mapping[str, Any]) -> str:
    """Return the absolute path of the model that a training started from; empty if the settings do not name it."""
    model = config_table(config, "model").get("path")
    if not isinstance(model, str) or not model:
        return ""
    # Relative paths in config.toml, such as that of the run itself, are relative to the folder where it was started.
    named = Path(str(config_table(config, "train").get("run_dir", ""))).parts
    folder = run_dir.absolute()
    is_below = 0 < len(named) < len(folder.parts) and folder.parts[-len(named) :] == named
    return str((folder.parents[len(named) - 1] if is_below else Path.cwd()) / model)


def _first_task(manifest: Path) -> str | None:
    """Return the task of a manifest's first sample; None if the manifest cannot be read."""
    try:
        row = parse_json(next(iter(read_lines(manifest))), manifest)
    except (UserError, StopIteration):
        return None
    return str(row.get("task")) if isinstance(row, dict) else None
