"""Temporal grounding: Charades-STA (text and JSON) and ActivityNet Captions (JSON)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_vcr1.data.importers.cleaning import Row
from megatron_vcr1.data.importers.files import read_csv, read_json, read_lines
from megatron_vcr1.errors import UserError

_CHARADES_LINE = re.compile(r"(\S+) (\S+) (\S+?)##(.*)")


def read_charades_sta(annotations: tuple[Path, ...]) -> Iterator[Row]:
    """Read Charades-STA: ``VIDEO start end##query`` lines with a CSV file of video lengths, or a single JSON file."""
    if len(annotations) == 1 and annotations[0].suffix == ".json":
        yield from read_timestamps(annotations)
        return
    text_file, lengths_file = _file_of_each_suffix(annotations, (".txt", ".csv"))
    duration_s = {row["id"]: float(row["length"]) for row in read_csv(lengths_file)}
    queries_per_video: Counter[str] = Counter()
    for line in read_lines(text_file):
        match = _CHARADES_LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"line {line!r} is not 'VIDEO start end##query'")
        video, start, end, query = match.groups()
        yield _row(video, queries_per_video[video], duration_s[video], [float(start), float(end)], query)
        queries_per_video[video] += 1


def read_timestamps(annotations: tuple[Path, ...]) -> Iterator[Row]:
    """Read ``{video: {duration, timestamps: [[start, end]], sentences: []}}``, the format of ActivityNet Captions."""
    for path in annotations:
        for video, entry in read_json(path).items():
            for index, (span, query) in enumerate(zip(entry["timestamps"], entry["sentences"], strict=True)):
                yield _row(video, index, entry["duration"], span, query)


def _row(video: str, index: int, duration_s: float, span: list[float], query: str) -> Row:
    return {
        "id": f"{video}_{index}",
        "task": "temporal_grounding",
        "video": video,
        "duration_s": duration_s,
        "query": query.strip(),
        "target": {"interval": span},
    }


def _file_of_each_suffix(annotations: tuple[Path, ...], suffixes: tuple[str, ...]) -> list[Path]:
    by_suffix = {path.suffix: path for path in annotations}
    if len(annotations) != len(suffixes) or set(by_suffix) != set(suffixes):
        given = " ".join(map(str, annotations))
        raise UserError(f"--annotations {given}: expected one file for each of {', '.join(suffixes)}, or one .json")
    return [by_suffix[suffix] for suffix in suffixes]
