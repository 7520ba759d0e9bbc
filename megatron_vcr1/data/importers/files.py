"""Reading of annotation files: JSON, JSON lines, CSV, and the tables of Hugging Face datasets.

Text files are UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vcr1.errors import UserError


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file with a header line.

    Raises:
        UserError: the file is missing or not UTF-8 text.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as CSV: {error}") from error


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file, without line ends and without blank lines.

    Raises:
        UserError: the file is missing or not UTF-8 text.
    """
    try:
        # splitlines would also split at Unicode's line separators, which JSON strings may contain.
        return [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from error


def read_table(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a ``.json`` list, ``.jsonl``, ``.parquet`` or ``.arrow`` file, or of a folder of such files.

    A folder is one that `datasets.Dataset.save_to_disk` wrote, or the downloaded data folder of a dataset repository.

    Raises:
        UserError: the file is missing, damaged or of another type, or pyarrow is needed and not installed.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".parquet", ".arrow", ".jsonl"))
        if not files:
            raise UserError(f"{path}: the folder has no .parquet, .arrow or .jsonl file; name the folder that has them")
        for file in files:
            yield from read_table(file)
    elif path.suffix == ".json":
        yield from read_json(path)
    elif path.suffix == ".jsonl":
        yield from _read_json_lines(path)
    elif path.suffix in (".parquet", ".arrow"):
        yield from _read_arrow(path)
    else:
        raise UserError(f"{path}: expected a .json, .jsonl, .parquet or .arrow file, or a folder of them")


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for line_number, line in enumerate(read_lines(path), start=1):
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: row {line_number} is not JSON: {error}") from error


def _read_arrow(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{path}: reading it needs pyarrow; install it with `pip install pyarrow`") from error
    try:
        if path.suffix == ".parquet":
            table = pyarrow.parquet.read_table(path)
        else:
            with pyarrow.memory_map(str(path)) as source:
                table = pyarrow.ipc.open_stream(source).read_all()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    for batch in table.to_batches(max_chunksize=1024):
        yield from batch.to_pylist()
