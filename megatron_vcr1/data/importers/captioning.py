"""Captioning: CaReBench / FIBER-1k and DREAM-1K."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vcr1.data.importers.files import MalformedRow, Row, convert_rows, id_of_file, read_table


def read_captions(annotations: tuple[Path, ...]) -> Iterator[Row | MalformedRow]:
    """Read CaReBench and FIBER-1k: rows of ``video`` and ``caption``, in a JSON list or JSON lines."""
    for path in annotations:
        yield from convert_rows(read_table(path), _caption_row, lambda entry: id_of_file(entry["video"]))


def _caption_row(entry: Row) -> Row:
    return {
        "id": id_of_file(entry["video"]),
        "task": "captioning",
        "video": entry["video"],
        "duration_s": None,
        "target": {"caption": entry["caption"]},
    }


def read_dream1k(annotations: tuple[Path, ...], split: str | None) -> Iterator[Row | MalformedRow]:
    """Read DREAM-1K: JSON lines with a reference caption and its events; a split is a source, e.g. ``DREAM/videvo``.

    The published lines have a placeholder instead of the file name; such a video is named by its number.
    """
    for path in annotations:
        yield from convert_rows(
            read_table(path),
            lambda entry: _dream1k_row(entry) if split in (None, entry["dataset"]) else None,
            lambda entry: f"dream_{entry['idx']}",
        )


def _dream1k_row(entry: dict[str, Any]) -> Row:
    prompt, answer = entry["messages"]
    video_file = prompt["content"][0]["video"]["video_file"]
    return {
        "id": f"dream_{entry['idx']}",
        "task": "captioning",
        "video": str(entry["vid"]) if video_file == "<placeholder>" else video_file,
        "duration_s": entry["extra_info"]["duration"],
        "category": entry["dataset"],
        "target": {"caption": answer["content"][0]["reference"], "events": entry["extra_info"]["events"]},
    }
