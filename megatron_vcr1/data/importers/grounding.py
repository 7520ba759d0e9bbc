"""Temporal grounding: Charades-STA (text and JSON), ActivityNet Captions (JSON) and QVHighlights (JSON lines)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vcr1.data.importers.files import (
    MALFORMED,
    MalformedRow,
    Row,
    convert_rows,
    describe,
    read_json_object,
    read_lines,
    read_table,
)
from megatron_vcr1.errors import UserError

_CHARADES_LINE = re.compile(r"(\S+) (\S+) (\S+?)##(.*)")


def read_charades_sta(annotations: tuple[Path, ...]) -> Iterator[Row | MalformedRow]:
    """Read Charades-STA: ``VIDEO start end##query`` lines with a CSV file of video lengths, or a single JSON file."""
    if len(annotations) == 1 and annotations[0].suffix == ".json":
        yield from read_timestamps(annotations)
        return
    text_file, lengths_file = _file_of_each_suffix(annotations, (".txt", ".csv"))
    lengths, malformed = _video_lengths(lengths_file)
    queries_per_video: Counter[str] = Counter()
    for number, line in enumerate(read_lines(text_file), start=1):
        match = _CHARADES_LINE.fullmatch(line)
        if match is None:
            place = f"{text_file.name}, row {number}"
            yield MalformedRow(place, f"line {line!r:.200} is not 'VIDEO start end##query'")
            continue
        video, start, end, query = match.groups()
        index = queries_per_video[video]
        queries_per_video[video] += 1  # counted for malformed rows too: the ids of later rows do not depend on them
        try:
            yield _row(video, index, float(lengths[video]), [float(start), float(end)], query)
        except MALFORMED as error:
            yield MalformedRow(f"{video}_{index}", f"{line!r:.200}: {describe(error)}")
    yield from malformed  # last: an import ends if its first row is malformed


def read_timestamps(annotations: tuple[Path, ...]) -> Iterator[Row | MalformedRow]:
    """Read ``{video: {duration, timestamps: [[start, end]], sentences: []}}``, the format of ActivityNet Captions."""
    for path in annotations:
        for video, entry in read_json_object(path).items():
            try:
                rows = _video_rows(video, entry)
            except MALFORMED as error:
                yield MalformedRow(video, describe(error))
            else:
                yield from rows


def read_qvhighlights(annotations: tuple[Path, ...]) -> Iterator[Row | MalformedRow]:
    """Read QVHighlights: ``qid``, ``query``, ``vid``, ``duration`` and ``relevant_windows``, all spans of the event."""
    for path in annotations:
        yield from convert_rows(read_table(path), _qvhighlights_row, lambda entry: str(entry["qid"]))


def _qvhighlights_row(entry: Row) -> Row:
    return {
        "id": str(entry["qid"]),
        "task": "temporal_grounding",
        "video": entry["vid"],
        "duration_s": entry["duration"],
        "query": entry["query"].strip(),
        "target": {"intervals": entry["relevant_windows"]},
    }


def _video_rows(video: str, entry: dict[str, Any]) -> list[Row | MalformedRow]:
    """Return the rows of a video. A malformed sentence costs its own row only."""
    rows: list[Row | MalformedRow] = []
    duration_s = entry["duration"]
    for index, (span, query) in enumerate(zip(entry["timestamps"], entry["sentences"], strict=True)):
        try:
            rows.append(_row(video, index, duration_s, span, query))
        except MALFORMED as error:
            rows.append(MalformedRow(f"{video}_{index}", describe(error)))
    return rows


def _row(video: str, index: int, duration_s: float, span: list[float], query: str) -> Row:
    return {
        "id": f"{video}_{index}",
        "task": "temporal_grounding",
        "video": video,
        "duration_s": duration_s,
        "query": query.strip(),
        "target": {"interval": span},
    }


def _video_lengths(path: Path) -> tuple[dict[str, str], list[MalformedRow]]:
    """Return the published length of each video as text, and the malformed rows, which cost their videos' rows."""
    entries = [row for _, row in read_table(path)]
    rows = [row for row in entries if not isinstance(row, MalformedRow)]
    if rows and not {"id", "length"} <= rows[0].keys():
        raise UserError(f"{path}: expected the columns id and length, got {', '.join(map(str, rows[0]))}")
    lengths: dict[str, str] = {}
    for row in rows:
        if (length := lengths.setdefault(row["id"], row["length"])) != row["length"]:
            raise UserError(f"{path}: {row['id']} has the lengths {length} and {row['length']}; remove one of its rows")
    return lengths, [row for row in entries if isinstance(row, MalformedRow)]


def _file_of_each_suffix(annotations: tuple[Path, ...], suffixes: tuple[str, ...]) -> list[Path]:
    by_suffix = {path.suffix: path for path in annotations}
    if len(annotations) != len(suffixes) or set(by_suffix) != set(suffixes):
        given = " ".join(map(str, annotations))
        raise UserError(f"--annotations {given}: expected one file for each of {', '.join(suffixes)}, or one .json")
    return [by_suffix[suffix] for suffix in suffixes]
