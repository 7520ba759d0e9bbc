"""Your own annotations: a table whose columns are named in the command line."""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vcr1 import text_files
from megatron_vcr1.data.importers.files import MalformedRow, Row, convert_rows, numbered_id, read_table
from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import Task, UnknownTaskError, find_task
from megatron_vcr1.tasks.row_fields import INTERVAL, NUMBER, TEXT, JsonForm, list_of

_LIST_OF_TEXT = list_of(TEXT)
_SPANS = list_of(INTERVAL).name
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
    num_rows_of: Counter[str] = Counter()
    for path in annotations:
        entries = list(read_table(path))
        if not entries:
            raise UserError(f"{path}: the table has no rows")
        columns = _columns_of(entries)
        by_key = _resolve(column_map, columns, path)
        _check_keys(by_key, columns, task_name, path)
        yield from convert_rows(
            entries,
            lambda entry, by_key=by_key: _row(entry, by_key, task_name, num_rows_of),  # type: ignore[misc]
            lambda entry, by_key=by_key: str(_value(entry, by_key["id"])),  # type: ignore[misc]
        )


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
    if task_name is None:
        needed = ["target", "task"]
    else:
        task = _task(task_name)
        needed = ["video"] if task.needs_media and not top_level & set(_MEDIA) else []
        needed += ["target"] + ["query"] * task.needs_query + ["options"] * task.has_options
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


def _row(entry: Mapping[str, Any], by_key: Mapping[str, str], task_name: str | None, num_rows_of: Counter[str]) -> Row:
    """Convert an entry to a manifest row; it may lack keys or have values of another type, which cleaning reports."""
    values = {key: value for key, column in by_key.items() if not _is_missing(value := _value(entry, column))}
    media = {key: _paths(values[key], by_key[key]) for key in _MEDIA if key in values}
    # Malformed rows are counted, too: the ids of later rows do not depend on them.
    row_id = numbered_id(_first_path(next(iter(media.values()))) if media else "row", num_rows_of)
    task = _task(task_name or values["task"])
    if task.needs_media and not media:
        raise KeyError("video")
    row: Row = {"id": row_id, "duration_s": None, "query": "", "task": task.name}
    for key, form in _ROW_FORMS.items():
        if key in values and key != "task" and key not in _MEDIA:
            row[key] = _typed(values[key], form, by_key[key])
    if options := _options(values):
        row["options"] = options
    return {**row, **media, "target": _target(values, task, by_key)}


def _options(values: Mapping[str, Any]) -> list[str]:
    """Return the texts of options.0, options.1 ...; cells after the last option may be empty.

    Raises:
        ValueError: a cell before another option is empty: the options after it would get other letters.
    """
    given = {key: str(value) for key, value in values.items() if key.startswith("options.")}
    keys = [f"options.{number}" for number in range(len(given))]
    if missing := [key for key in keys if key not in given]:
        raise ValueError(f"{missing[0]} is empty, but there is {max(given)}; give the options without a gap")
    return [given[key] for key in keys]


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
    forms = {field.key: field.form for field in task.target_fields}
    ends = ("target.start", "target.end") if _has_span(forms) else ()
    target: Row = {}
    for key, value in values.items():
        outer, _, inner = key.partition(".")
        if key == "target":
            target |= _object(value, by_key[key])
        elif outer == "target" and key not in ends:
            target[inner] = _typed(value, forms.get(inner, TEXT), by_key[key])
    if any(key in by_key for key in ends):
        span = [_typed(values[key], NUMBER, by_key[key]) for key in ends]
        single = [key for key, form in forms.items() if form is INTERVAL]
        several = [key for key, form in forms.items() if form.name == _SPANS]
        target |= {single[0]: span} if single else {several[0]: [span]}
    return target


def _has_span(forms: Mapping[str, JsonForm]) -> bool:
    """Return whether target.start and target.end are the ends of a span: they are not if the task has such keys."""
    if forms.keys() & {"start", "end"}:
        return False
    return any(form is INTERVAL or form.name == _SPANS for form in forms.values())


def _object(value: Any, column: str) -> Mapping[str, Any]:
    """Return the object of a cell; in CSV, it is written as JSON."""
    parsed = text_files.parse_json(value, f"column {column!r}") if isinstance(value, str) else value
    if not isinstance(parsed, Mapping):
        raise ValueError(f"column {column!r} holds {value!r:.60}, which is not an object of the target's keys")
    return parsed


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
