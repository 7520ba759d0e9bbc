"""Manifest files: JSON lines with one sample per line, validated when they are read and trusted everywhere else.

`megatron_vcr1.data.rows` describes the keys of a row. A relative ``video`` is relative to the manifest's folder;
samples that were read hold absolute paths.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from megatron_vcr1.data.rows import row_from_sample, sample_from_row
from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks.row_fields import RowError
from megatron_vcr1.text_files import MAX_LINE_CHARACTERS, read_lines
from megatron_vcr1.types import Sample

_MAX_LISTED_ERRORS = 20


class ManifestError(UserError):
    """A manifest with bad rows; the message lists the file, line, key and what to do."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A line of a manifest that is not a valid sample.

    Attributes:
        line: line number, from 1.
        id: id of the row; None if it cannot be read.
        problem: description of the problem, and what to do.
    """

    line: int
    id: str | None
    problem: str


def read_manifest(path: str | Path) -> list[Sample]:
    """Read all samples of a manifest, in order.

    Raises:
        ManifestError: the file is missing or empty, or has bad rows; up to 20 of them are listed.
    """
    samples, bad_rows = [], []
    for row in scan_manifest(path):
        if isinstance(row, BadRow):
            bad_rows.append(row)
        else:
            samples.append(row)
    if bad_rows:
        listed = "\n".join(f"  {path}, line {bad.line}: {bad.problem}" for bad in bad_rows[:_MAX_LISTED_ERRORS])
        more = len(bad_rows) - _MAX_LISTED_ERRORS
        raise ManifestError(
            f"{path}: {len(bad_rows)} bad rows\n{listed}"
            + (f"\n  and {more} more: see `vcr1 data check {path}`" if more > 0 else "")
        )
    if not samples:
        raise ManifestError(f"{path}: no rows; a manifest holds one JSON object per line")
    return samples


def scan_manifest(path: str | Path) -> Iterator[Sample | BadRow]:
    """Yield the sample of each line, or a description of its problem; blank lines are skipped.

    Raises:
        ManifestError: the file cannot be read.
    """
    path = Path(path).absolute()
    lines_by_id: dict[str, int] = {}
    if not path.exists():
        raise ManifestError(
            f"{path}: no such manifest; `vcr1 data import` makes one from a published dataset's annotations"
        )
    lines = read_lines(path)
    for line_number in count(1):
        try:
            line = next(lines, None)
        except UserError as error:
            raise ManifestError(str(error)) from None
        if line is None:
            break
        if line.strip():
            yield _parse_line(line, line_number, path.parent, lines_by_id)


def write_manifest(path: str | Path, samples: Iterable[Sample]) -> None:
    """Write samples as JSON lines. The file gets its name only when it is complete.

    A video below the manifest's folder is written as a relative path, so that the folder can be moved.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("w", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps(row_from_sample(sample, path.parent), ensure_ascii=False) + "\n")
    unfinished.replace(path)


def _parse_line(line: str, line_number: int, folder: Path, lines_by_id: dict[str, int]) -> Sample | BadRow:
    """Parse a line; `lines_by_id` collects the line number of each id, to find repeated ids."""
    row_id = None
    if len(line) > MAX_LINE_CHARACTERS:
        return BadRow(line_number, None, f"longer than {MAX_LINE_CHARACTERS} characters; write one object per line")
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow(line_number, None, f"not JSON ({error.msg} at column {error.colno}); write one object per line")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or deeply nested brackets
        return BadRow(line_number, None, f"JSON that Python cannot read ({error})")
    try:
        row_id = row["id"] if isinstance(row, dict) and isinstance(row.get("id"), str) else None
        sample = sample_from_row(row, folder)
    except RowError as error:
        return BadRow(line_number, row_id, str(error))
    except RecursionError:  # JSON that is almost too deep for Python to read is too deep to be shown in an error
        return BadRow(line_number, row_id, "nested too deeply")
    first_line = lines_by_id.setdefault(sample.id, line_number)
    if first_line != line_number:
        return BadRow(line_number, row_id, f"key 'id': {sample.id!r} is already on line {first_line}; make ids unique")
    return sample
