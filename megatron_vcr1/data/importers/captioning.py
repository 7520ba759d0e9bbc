"""Captioning: CaReBench / FIBER-1k and DREAM-1K."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_vcr1.data.importers.cleaning import Row
from megatron_vcr1.data.importers.files import read_table


def read_captions(annotations: tuple[Path, ...]) -> Iterator[Row]:
    """Read CaReBench and FIBER-1k: rows of ``video`` and ``caption``, in a JSON list or JSON lines."""
    for path in annotations:
        for entry in read_table(path):
            yield {
                "id": Path(entry["video"]).stem,
                "task": "captioning",
                "video": entry["video"],
                "duration_s": None,
                "target": {"caption": entry["caption"]},
            }


def read_dream1k(annotations: tuple[Path, ...], split: str | None) -> Iterator[Row]:
    """Read DREAM-1K: JSON lines with a reference caption and its events; a split is a source, e.g. ``DREAM/videvo``.

    The published lines have a placeholder instead of the file name; such a video is named by its number.
    """
    for path in annotations:
        for entry in read_table(path):
            if split not in (None, entry["dataset"]):
                continue
            prompt, answer = entry["messages"]
            video_file = prompt["content"][0]["video"]["video_file"]
            yield {
                "id": f"dream_{entry['idx']}",
                "task": "captioning",
                "video": str(entry["vid"]) if video_file == "<placeholder>" else video_file,
                "duration_s": entry["extra_info"]["duration"],
                "category": entry["dataset"],
                "target": {"caption": answer["content"][0]["reference"], "events": entry["extra_info"]["events"]},
            }
