"""Reading of annotation files: JSON, JSON lines, CSV, and the tables of Hugging Face datasets.

Text files are UTF-8, with or without a byte order mark. Readers of rows go on after a malformed row: they yield a
`MalformedRow` in its place.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from megatron_vcr1 import text_files
from megatron_vcr1.errors import UserError

Row = dict[str, Any]

T = TypeVar("T")

_SUFFIX = re.compile(r"\.[0-9]?[A-Za-z][A-Za-z0-9]*$")  # .mp4, .m2ts and .3gp, but no decimals

MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError)
"""Errors of code that takes a row apart whose values are of other types, missing, or out of range."""


@dataclass(frozen=True, slots=True)
class MalformedRow:
    """A published row that does not have the form of its format.

    Attributes:
        row_id: id of the row; its place in the file if it has no readable id.
        problem: description for people.
    """

    row_id: str
    problem: str


def convert_rows(
    entries: Iterable[tuple[str, Any]], convert: Callable[[Any], T | None], row_id: Callable[[Any], str] | None = None
) -> Iterator[T | MalformedRow]:
    """Convert published entries to rows, and go on after a malformed entry.

    Args:
        entries: the entries, each with its place in the file.
        convert: function that takes an entry apart; None leaves the entry out. It may raise the errors of `MALFORMED`.
        row_id: function that returns the id of an entry, which may be malformed; by default its place.
    """
    for place, entry in entries:
        if isinstance(entry, MalformedRow):
            yield entry
            continue
        try:
            row = convert(entry)
        except MALFORMED as error:
            yield MalformedRow(_readable_id(entry, row_id) or place, describe(error))
        else:
            if row is not None:
                yield row


def describe(error: Exception) -> str:
    """Describe why an entry could not be taken apart."""
    if isinstance(error, UserError):
        return str(error)
    return f"{error} is missing" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"


def read_json_list(path: Path) -> list[tuple[str, Any]]:
    """Read a JSON file that holds a list; return its entries, each with its place in the file.

    Raises:
        UserError: the file is missing, not JSON, or holds something else than a list.
    """
    try:
        content = text_files.read_json(path)
    except UserError as error:
        hint = "; if each of its lines is an object, rename it to .jsonl" if "Extra data" in str(error) else ""
        raise UserError(f"{error}{hint}") from None
    if not isinstance(content, list):
        kind = "an object" if isinstance(content, dict) else f"{content!r:.40}"
        raise UserError(f"{path}: expected a JSON list of rows, got {kind}; is it a file of another format?")
    return [(f"{path.name}, row {number}", entry) for number, entry in enumerate(content, start=1)]


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: the file is missing, not JSON, holds something else than an object, or has a key twice.
    """
    content = text_files.read_json(path, object_pairs_hook=partial(_without_repeated_keys, path))
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else f"{content!r:.40}"
        raise UserError(
            f"{path}: expected a JSON object with one entry for each video, got {kind}; is it a file of another format?"
        )
    return content


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file, without line ends and without blank lines.

    Raises:
        UserError: the file is missing or not UTF-8 text.
    """
    # splitlines would also split at Unicode's line separators, which JSON strings may contain.
    return [line.rstrip("\r") for line in text_files.read_text(path).split("\n") if line.strip()]


def read_table(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a ``.json`` list, a ``.jsonl``, ``.csv``, ``.parquet`` or ``.arrow`` file, or a folder of them.

    A folder is one that `datasets.Dataset.save_to_disk` wrote, or the downloaded data folder of a dataset repository.
    Hidden files in it are ignored.

    Yields:
        The place of a row in its file, and the row; a `MalformedRow` for a line that is not JSON, or a row of CSV with
        more cells than there are columns.

    Raises:
        UserError: the file is missing, damaged or of another type, or pyarrow is needed and not installed.
    """
    if path.is_dir():
        files = visible_files(path, (".parquet", ".arrow", ".jsonl"))
        if not files:
            raise UserError(f"{path}: the folder has no .parquet, .arrow or .jsonl file; name the folder that has them")
        for file in files:
            yield from read_table(file)
    elif path.suffix == ".json":
        yield from read_json_list(path)
    elif path.suffix == ".jsonl":
        yield from _read_json_lines(path)
    elif path.suffix == ".csv":
        yield from _read_csv(path)
    elif path.suffix in (".parquet", ".arrow"):
        for number, row in enumerate(_read_arrow(path), start=1):
            yield f"{path.name}, row {number}", row
    else:
        raise UserError(f"{path}: expected a .json, .jsonl, .csv, .parquet or .arrow file, or a folder of them")


def id_of_file(path: str) -> str:
    """Return an id for a video that has one row: its path without suffix. Names such as ``a_1.5`` have no suffix."""
    return _SUFFIX.sub("", str(PurePosixPath(path))).strip("/").replace("/", "_")


def numbered_id(path: str, num_rows_of: Counter[str]) -> str:
    """Return an id for the next row of a video or image: its path without suffix, and a number that counts its rows."""
    name = id_of_file(path)
    number = num_rows_of[name]
    num_rows_of[name] += 1
    return f"{name}_{number}"


def visible_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """List the files of a folder by name, without hidden ones such as the ``._a.json`` that macOS writes."""
    return sorted(file for file in folder.iterdir() if file.suffix in suffixes and not file.name.startswith("."))


def _without_repeated_keys(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object of JSON. Refuse a repeated key: Python would keep only the last of a video's entries."""
    if len(content := dict(pairs)) < len(pairs):
        name = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise UserError(f"{path}: the key {name!r} occurs more than once in an object; merge or rename its entries")
    return content


def _readable_id(entry: Any, row_id: Callable[[Any], str] | None) -> str | None:
    if row_id is None:
        return None
    try:
        return row_id(entry)
    except MALFORMED:
        return None


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(read_lines(path), start=1):
        place = f"{path.name}, row {number}"
        try:
            row = text_files.parse_json(line, place)
        except UserError as error:
            row = MalformedRow(place, str(error))
        yield place, row


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a CSV file with a header line, separated by commas, semicolons or tabs.

    Columns that a row lacks are None.
    """
    text = text_files.read_text(path)
    header = text.partition("\n")[0]
    separator = max(",;\t", key=header.count)  # spreadsheets write semicolons where the decimal sign is a comma
    # Strict: otherwise, a quotation mark that is never closed would make the rest of the file one cell.
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        _check_columns(path, reader.fieldnames or ())
        for number, row in enumerate(reader, start=1):
            place = f"{path.name}, row {number}"
            # The cells beyond the last column are under the key None.
            if (surplus := row.get(None)) is not None:  # type: ignore[call-overload]
                problem = (
                    f"{len(surplus)} more cells than columns; put quotes around a text that contains {separator!r}"
                )
                yield place, MalformedRow(place, problem)
            else:
                yield place, row
    except csv.Error as error:
        # line_num is the last line of the row before. A quotation mark without its pair is an "unexpected end of data".
        raise UserError(f"{path}, after line {reader.line_num}: cannot be read as CSV: {error}") from error


def _read_arrow(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading it needs pyarrow; install it with `pip install pyarrow`") from error
    try:
        with open(text_files.open_regular(path), "rb") as file:
            if path.suffix == ".parquet":
                table = pyarrow.parquet.read_table(file)
            else:
                table = pyarrow.ipc.open_stream(file).read_all()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    _check_columns(path, table.column_names)
    for batch in table.to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def _check_columns(path: Path, names: Iterable[str]) -> None:
    """Refuse a table with several columns of one name: a row would keep only the last one's value.

    Columns without a name, as a spreadsheet may append them, cannot be asked for and do no harm.
    """
    for name, count in Counter(names).items():
        if name and count > 1:
            raise UserError(f"{path}: {count} columns are named {name!r}; rename or remove all but one")
