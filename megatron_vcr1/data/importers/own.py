"""Your own annotations: a table whose columns are named in the command line."""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_vcr1.data.importers.files import MalformedRow, Row, convert_rows, read_csv, read_table
from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import Task, UnknownTaskError, find_task
from megatron_vcr1.tasks.row_fields import INTERVAL, NUMBER, TEXT, JsonForm, list_of

_LIST_OF_TEXT = list_of(TEXT)
_MEDIA = ("video", "videos", "image", "images")
_ROW_FORMS = {
    "id": TEXT,
    "task": TEXT,
    "video": TEXT,
    "videos": _LIST_OF_TEXT,
    "image": TEXT,
    "images": _LIST_OF_TEXT,
    "query": TEXT,
    "category": TEXT,
    "thinking": TEXT,
    "duration_s": NUMBER,
    "image_fps": NUMBER,
    "options": _LIST_OF_TEXT,
    "clip": INTERVAL,
}
_MAX_OPTIONS = 26


@dataclass(frozen=True, slots=True)
class ColumnMap:
    """The columns of a table, by the key of a manifest row that each of them fills.

    A key of the target is written ``target.label``. ``target.start`` and ``target.end`` together fill the span of a
    target, ``target.answer`` states the right option by its text, and ``options.0``, ``options.1`` ... fill the options
    one by one.

    Attributes:
        columns: column by key. Columns that have the name of a key fill it without being named.
    """

    columns: Mapping[str, str]

    @classmethod
    def parse(cls, texts: Iterable[str]) -> ColumnMap:
        """Parse ``column=key`` texts; each may hold several, separated by commas.

        Raises:
            UserError: a text has another form, or two columns fill the same key.
        """
        columns: dict[str, str] = {}
        for pair in (pair for text in texts for pair in text.split(",") if pair):
            column, equals, key = (part.strip() for part in pair.rpartition("="))
            if not (column and equals and key):
                raise UserError(f"--columns {pair}: write COLUMN=KEY, for example sentence=query")
            if key in columns:
                raise UserError(f"--columns {pair}: {columns[key]}={key} is given, too; name one column for {key}")
            columns[key] = column
        return cls(columns)


def read_own(
    annotations: tuple[Path, ...], task_name: str | None, column_map: ColumnMap
) -> Iterator[Row | MalformedRow]:
    """Read tables of any columns: .json (a list of objects), .jsonl, .csv, .parquet or .arrow files.

    Args:
        annotations: the files.
        task_name: task of all rows; None if each row has a task.
        column_map: the columns by key.

    Raises:
        UserError: a file cannot be read, a column does not exist, or a key that every sample needs has no column.
    """
    num_of_video: Counter[str] = Counter()
    for path in annotations:
        entries = _read(path)
        columns = _columns_of(entries)
        by_key = _resolve(column_map, columns, path)
        _check_keys(by_key, columns, task_name, path)
        yield from convert_rows(
            entries,
            lambda entry, by_key=by_key: _row(entry, by_key, task_name, num_of_video),  # type: ignore[misc]
            lambda entry, by_key=by_key: str(_value(entry, by_key["id"])),  # type: ignore[misc]
        )


def _read(path: Path) -> list[tuple[str, Any]]:
    if path.suffix == ".csv":
        return [(f"{path.name}, row {number}", row) for number, row in enumerate(read_csv(path), start=1)]
    return list(read_table(path))


def _columns_of(entries: Sequence[tuple[str, Any]]) -> list[str]:
    """Return the names of all columns; those of nested objects as ``outer.inner``."""
    names: dict[str, None] = {}

    def add(entry: Mapping[str, Any], prefix: str) -> None:
        for name, value in entry.items():
            names[f"{prefix}{name}"] = None
            if isinstance(value, Mapping):
                add(value, f"{prefix}{name}.")

    for _, entry in entries:
        if isinstance(entry, Mapping):
            add(entry, "")
    return list(names)


def _resolve(column_map: ColumnMap, columns: Sequence[str], path: Path) -> dict[str, str]:
    """Return the column of each key: the named ones, and columns that have the name of a key."""
    for key, column in column_map.columns.items():
        if column not in columns:
            close = difflib.get_close_matches(column, columns, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"--columns {column}={key}: {path} has the columns {', '.join(columns)}{hint}")
    named = set(column_map.columns.values())
    known = [
        name
        for name in columns
        if (name in _ROW_FORMS or name.startswith(("target.", "options."))) and name not in named
    ]
    return {**{name: name for name in known}, **column_map.columns}


def _check_keys(by_key: Mapping[str, str], columns: Sequence[str], task_name: str | None, path: Path) -> None:
    """Raise UserError if a key is unknown, or if a key that each sample needs has no column."""
    top_level = {key.partition(".")[0] for key in by_key}
    if unknown := sorted(top_level - {*_ROW_FORMS, "target"}):
        raise UserError(
            f"--columns {by_key.get(unknown[0], '...')}={unknown[0]}: there is no such key; use one of "
            f"{', '.join(_ROW_FORMS)} or target.KEY"
        )
    needed = ["target"] if top_level & set(_MEDIA) else ["video", "target"]
    if task_name is None:
        needed.append("task")
    else:
        task = _task(task_name)
        needed += ["query"] * task.needs_query + ["options"] * task.has_options
    if missing := [key for key in needed if key not in top_level]:
        example = {"task": "or give --task", "target": "for example start=target.start,end=target.end"}
        more = f" ({example[missing[0]]})" if missing[0] in example else ""
        raise UserError(
            f"{path}: no column is named for the key {missing[0]}: add COLUMN={missing[0]} to --columns{more}; the "
            f"columns are {', '.join(columns)}"
        )


def _task(name: str) -> Task[Any]:
    try:
        return find_task(name)
    except UnknownTaskError as error:
        raise UserError(f"task {error}") from None


def _row(entry: Mapping[str, Any], by_key: Mapping[str, str], task_name: str | None, num_of_video: Counter[str]) -> Row:
    """Convert an entry to a manifest row; it may lack keys or have values of another type, which cleaning reports."""
    values = {key: value for key, column in by_key.items() if not _is_missing(value := _value(entry, column))}
    media = {key: _paths(values[key], by_key[key]) for key in _MEDIA if key in values}
    if not media:
        raise KeyError("video")
    name = _first_path(next(iter(media.values())))
    name = str(PurePosixPath(name).with_suffix("")).strip("/").replace("/", "_")
    index = num_of_video[name]
    num_of_video[name] += 1  # counted for malformed rows too: the ids of later rows do not depend on them
    task = _task(task_name or values["task"])
    row: Row = {"id": f"{name}_{index}", "duration_s": None, "query": "", "task": task.name}
    for key, form in _ROW_FORMS.items():
        if key in values and key != "task" and key not in _MEDIA:
            row[key] = _typed(values[key], form, by_key[key])
    if options := [str(values[key]) for number in range(_MAX_OPTIONS) if (key := f"options.{number}") in values]:
        row["options"] = options
    return {**row, **media, "target": _target(values, task, by_key)}


def _paths(value: Any, column: str) -> Any:
    """Return the files of a cell; in CSV, a list of them is written as JSON."""
    if isinstance(value, str) and value.startswith("["):
        return _typed(value, _LIST_OF_TEXT, column)
    return str(value) if isinstance(value, int | float) else value


def _first_path(value: Any) -> str:
    """Return the first file of a cell: a path, an object with a path, or a list of either."""
    if isinstance(value, list):
        return _first_path(value[0])
    return _first_path(value["video"]) if isinstance(value, Mapping) else str(value)


def _target(values: Mapping[str, Any], task: Task[Any], by_key: Mapping[str, str]) -> Row:
    """Build the target; its values are converted to the forms that the task reads."""
    target: Row = {}
    forms = {field.key: field.form for field in task.target_fields}
    for key, value in values.items():
        outer, _, inner = key.partition(".")
        if outer == "target" and inner and inner not in ("start", "end"):
            target[inner] = _typed(value, forms.get(inner, TEXT), by_key[key])
        elif key == "target":
            target |= value
    if "target.start" in by_key and "target.end" in by_key:
        span = [_typed(values[key], NUMBER, by_key[key]) for key in ("target.start", "target.end")]
        single = [key for key, form in forms.items() if form.name == INTERVAL.name]
        several = [key for key, form in forms.items() if form.name == list_of(INTERVAL).name]
        if single:
            target[single[0]] = span
        elif several:
            target[several[0]] = [span]
    return target


def _value(entry: Mapping[str, Any], column: str) -> Any:
    """Return the value of a column; ``outer.inner`` is also looked up in nested objects. None if there is none."""
    if column in entry:
        return entry[column]
    value: Any = entry
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _is_missing(value: Any) -> bool:
    """Return whether a cell is empty; tables of pandas hold NaN in place of null."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _typed(value: Any, form: JsonForm, column: str) -> Any:
    """Convert a text to the number or list that `form` expects, and a number to text where it expects text."""
    if form is TEXT:
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        if form is NUMBER:
            raise ValueError(f"column {column!r} holds {value!r:.60}, which is not a number") from None
        return value  # a word of a fixed set, or a value that the task refuses with the key's name
