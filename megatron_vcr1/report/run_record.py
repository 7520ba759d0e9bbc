"""Reads a run directory in any state: complete, still growing, or cut in the middle of a line."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import load_tasks
from megatron_vcr1.text_files import parse_json, parse_toml, read_lines, read_text

_LAST_STEP = 2**53  # larger numbers in a damaged file do not fit into the columns


@dataclass(frozen=True)
class MetricTable:
    """The columns of metrics.jsonl."""

    steps: NDArray[np.int64]
    """[num_rows], ascending and unique."""
    columns: Mapping[str, NDArray[np.float64]]
    """Values [num_rows] by name; NaN if a row lacks the key or holds no finite number."""

    def __len__(self) -> int:
        return len(self.steps)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric and its 95 % interval, as the evaluation wrote them; the interval may be missing."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class EvaluationResult:
    """The content of one folder evaluation/LABEL of a run."""

    label: str
    benchmark: str
    model: str
    thinking: bool | None
    num_samples: int
    metrics: Mapping[str, Estimate]
    folder: Path
    details: Mapping[str, Any]
    """The whole content of metrics.json."""


@dataclass(frozen=True)
class RunRecord:
    """The content of a run directory.

    Attributes:
        name: name of the folder.
        config: tables of config.toml; empty if there is none.
        starts: rows of starts.jsonl; each names the first step, the time, the machine and the versions of a start.
        skipped: for each sample that the run could not use, the reason by its id.
        problems: descriptions of what could not be read.
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    config_text: str
    starts: Sequence[Mapping[str, Any]]
    metrics: MetricTable
    evaluations: Sequence[EvaluationResult]
    skipped: Mapping[str, str]
    problems: Sequence[str]

    def setting(self, section: str, key: str) -> Any:
        """Return a value of config.toml; None if there is none."""
        return config_table(self.config, section).get(key)

    @cached_property
    def rollout_files(self) -> Mapping[int, Path]:
        """The files rollouts/step_N.jsonl by N, ascending."""
        files = (self.path / "rollouts").glob("step_*.jsonl")
        numbered = {path.stem.removeprefix("step_"): path for path in files}
        return {int(step): path for step, path in sorted(numbered.items(), key=_by_number) if step.isdecimal()}

    @property
    def last_written(self) -> datetime | None:
        """When the run last wrote a step or a result."""
        files = [self.path / "metrics.jsonl", *(result.folder / "metrics.json" for result in self.evaluations)]
        times = [path.stat().st_mtime for path in files if path.exists()]
        return datetime.fromtimestamp(max(times)).astimezone() if times else None


def config_table(config: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    """Return a table of a run's config.toml, which may be damaged; empty if there is none."""
    table = config.get(section)
    return table if isinstance(table, dict) else {}


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Read run directories. Runs whose folders have the same name are named by their paths.

    Raises:
        UserError: a folder is given twice, or see `read_run`.
    """
    folders = [path.resolve() for path in paths]
    if len(set(folders)) < len(folders):
        raise UserError("a run is given twice; leave one out")
    names = Counter(folder.name for folder in folders)
    runs = [read_run(path) for path in paths]
    return [run if names[run.name] == 1 else replace(run, name=str(run.path)) for run in runs]


def read_run(path: Path) -> RunRecord:
    """Read a run directory.

    Raises:
        UserError: it is not a folder, or holds neither metrics nor evaluation results.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the folder of a run (train.run_dir)")
    problems: list[str] = []
    config_text = _read_text(path / "config.toml", problems)
    config = _parsed(config_text, parse_toml, "config.toml", problems)
    _load_tasks(config, problems)
    record = RunRecord(
        path=path,
        name=path.resolve().name,
        config=config,
        config_text=config_text,
        starts=tuple(read_json_lines(path / "starts.jsonl", problems)),
        metrics=read_metrics(path / "metrics.jsonl", problems),
        evaluations=tuple(_read_evaluations(path / "evaluation", problems)),
        skipped={
            str(row.get("id")): str(row.get("reason")) for row in read_json_lines(path / "skipped.jsonl", problems)
        },
        problems=problems,
    )
    if not len(record.metrics) and not record.evaluations:
        raise UserError(
            f"{path}: neither metrics.jsonl nor evaluation/*/metrics.json holds anything yet; give the folder of a run "
            "(train.run_dir) after its first step"
        )
    return record


def _load_tasks(config: Mapping[str, Any], problems: list[str]) -> None:
    """Import the modules of the user's tasks that the settings of the run name."""
    data = config_table(config, "data")
    modules = data.get("tasks")
    if not isinstance(modules, list):
        return
    folder = data.get("python_path")
    try:
        load_tasks(map(str, modules), Path(folder) if isinstance(folder, str) else None)
    except UserError as error:
        problems.append(str(error))


def read_json_lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file of lines; nothing if the file is missing.

    Lines that are not JSON objects are skipped and counted in `problems`. An incomplete last line is reported as such:
    its writer was killed, or is still writing.
    """
    if not path.exists():
        return
    bad: list[int] = []
    try:
        for number, line in enumerate(read_lines(path, errors="replace"), start=1):
            row = _row_of_line(line)
            if row is not None:
                yield row
            elif not line.endswith("\n"):
                problems.append(f"{path.name}: the last line is incomplete and is left out")
            elif line.strip():
                bad.append(number)
    except UserError as error:
        problems.append(str(error))
    if bad:
        problems.append(
            f"{path.name}: {len(bad)} lines are not JSON objects and are left out (the first is line {bad[0]})"
        )


def _row_of_line(line: str) -> dict[str, Any] | None:
    """Return the JSON object of a line; None if it holds something else."""
    try:
        row = parse_json(line, "line")
    except UserError:
        return None
    return row if isinstance(row, dict) else None


def _by_number(item: tuple[str, Path]) -> tuple[int, str]:
    return len(item[0]), item[0]


def _read_text(path: Path, problems: list[str]) -> str:
    """Return the text of a file; empty if there is none."""
    if not path.exists():
        return ""
    try:
        return read_text(path)
    except UserError as error:
        problems.append(str(error))
        return ""


def _parsed(text: str, parse: Any, name: str, problems: list[str]) -> Mapping[str, Any]:
    if not text:
        return {}
    try:
        tables = parse(text, name)
    except UserError as error:
        problems.append(str(error))
        return {}
    return tables if isinstance(tables, dict) else {}


def read_metrics(path: Path, problems: list[str]) -> MetricTable:
    """Read the rows by step; if a step was repeated after a resume, the later row counts."""
    rows: dict[int, Mapping[str, Any]] = {}
    num_repeated = 0
    for row in read_json_lines(path, problems):
        if type(row.get("step")) is not int or not 0 <= row["step"] <= _LAST_STEP:
            continue
        earlier = rows.get(row["step"], {})
        # A step has a row for its training and one for its validation.
        num_repeated += len(earlier.keys() & row.keys()) > 1
        rows[row["step"]] = {**earlier, **row}
    if num_repeated:
        problems.append(f"{path.name}: {num_repeated} steps were repeated after a resume; the later row counts")
    steps = sorted(rows)
    index = {step: row for row, step in enumerate(steps)}
    columns: dict[str, NDArray[np.float64]] = {}
    for step, values in rows.items():
        for key, value in values.items():
            number = _number(value)
            if number is not None and math.isfinite(number) and key != "step":
                if key not in columns:
                    columns[key] = np.full(len(steps), np.nan)
                columns[key][index[step]] = number
    return MetricTable(np.array(steps, np.int64), columns)


def _read_evaluations(folder: Path, problems: list[str]) -> Iterator[EvaluationResult]:
    for path in sorted(folder.glob("*/metrics.json")):
        name = f"evaluation/{path.parent.name}/metrics.json"
        details = _parsed(_read_text(path, problems), parse_json, name, problems)
        listed = details.get("metrics")
        metrics = {
            str(metric): estimate
            for metric, entry in (listed.items() if isinstance(listed, dict) else ())
            if (estimate := _estimate(entry)) is not None
        }
        if not metrics:
            problems.append(f"{name}: contains no metrics and is left out")
            continue
        yield EvaluationResult(
            label=path.parent.name,
            benchmark=str(details.get("benchmark", path.parent.name)),
            model=str(details.get("model", "")),
            thinking=details.get("thinking"),
            num_samples=_count(details.get("num_samples")),
            metrics=metrics,
            folder=path.parent,
            details=details,
        )


def _estimate(entry: object) -> Estimate | None:
    value = _number(entry.get("value")) if isinstance(entry, dict) else None
    if value is None or not isinstance(entry, dict):
        return None
    return Estimate(value, _number(entry.get("low")), _number(entry.get("high")))


def _count(value: object) -> int:
    return value if type(value) is int else 0


def _number(value: object) -> float | None:
    """Return a JSON number; None for other values, and for integers that no float can hold."""
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return None
