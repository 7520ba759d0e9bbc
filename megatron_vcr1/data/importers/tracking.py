"""Tracking: GOT-10k, from its sequence folders or from a JSON file with eight boxes per sequence."""

from __future__ import annotations

import configparser
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
from PIL import Image

from megatron_vcr1.data.importers.cleaning import Issue, Row, VideoFolder
from megatron_vcr1.data.importers.files import read_json, read_lines
from megatron_vcr1.data.paths import is_remote
from megatron_vcr1.data.video_types import frames_on_screen
from megatron_vcr1.errors import UserError
from megatron_vcr1.types import NUM_TRACKED_FRAMES

T = TypeVar("T")


def read_got10k(annotations: tuple[Path, ...], videos: VideoFolder, split: str | None) -> Iterator[Row | Issue]:
    """Read GOT-10k: sequence folders, or a JSON list of ``path``, ``object`` and ``gt`` (boxes in fractions).

    Eight evenly spaced frames of each sequence are used, including the first and the last one.
    """
    for path in annotations:
        if path.suffix == ".json":
            yield from _read_boxes_json(path, videos)
        else:
            yield from _read_sequences(path if split is None else path / split)


def _read_boxes_json(path: Path, videos: VideoFolder) -> Iterator[Row | Issue]:
    if videos.root is not None and is_remote(videos.root):
        raise UserError(f"--videos {videos.root}: the frames of each sequence must be listed; name a local folder")
    for entry in read_json(path):
        name = PurePosixPath(entry["path"]).name
        folder = videos.find(name) if videos.root is not None else None
        frames = _frames(Path(folder)) if folder is not None else []
        if folder is not None and len(frames) < NUM_TRACKED_FRAMES:
            yield Issue(
                name,
                "too_few_frames",
                f"{folder} has {len(frames)} images, but tracking needs {NUM_TRACKED_FRAMES}",
                "skipped",
            )
            continue
        yield {
            "id": name,
            "task": "tracking",
            "video": _chosen_files(frames) if frames else f"{name}/",
            "duration_s": None,
            "query": entry["object"],
            "target": {"boxes": entry["gt"]},
        }


def _read_sequences(folder: Path) -> Iterator[Row | Issue]:
    sequences = sorted(truth.parent for truth in folder.glob("*/groundtruth.txt"))
    if not sequences:
        raise UserError(f"{folder}: no sequence folders with a groundtruth.txt; name the folder of a split")
    for sequence in sequences:
        yield _sequence_row(sequence)


def _sequence_row(sequence: Path) -> Row | Issue:
    frames = _frames(sequence)
    boxes_px = [[float(value) for value in line.split(",")] for line in read_lines(sequence / "groundtruth.txt")]
    if len(boxes_px) != len(frames) or len(frames) < NUM_TRACKED_FRAMES:
        detail = f"{len(frames)} images and {len(boxes_px)} boxes (a test split publishes the first box only)"
        return Issue(sequence.name, "incomplete_sequence", detail, "skipped")
    absence_file = sequence / "absence.label"
    if absence_file.exists() and "1" in _choose_evenly([line.strip() for line in read_lines(absence_file)]):
        return Issue(sequence.name, "object_absent", "the object is out of sight in one of the eight frames", "skipped")
    meta_file = configparser.ConfigParser()
    meta_file.read(sequence / "meta_info.ini", encoding="utf-8")
    meta = meta_file["METAINFO"]
    with Image.open(frames[0]) as image:
        width, height = image.size
    return {
        "id": sequence.name,
        "task": "tracking",
        "video": _chosen_files(frames),
        "duration_s": len(frames) / float(meta["anno_fps"].removesuffix("Hz")),
        "query": meta["object_class"],
        "target": {"boxes": [_box_in_fractions(box_px, width, height) for box_px in _choose_evenly(boxes_px)]},
    }


def _box_in_fractions(box_px: list[float], width: int, height: int) -> list[float]:
    """Convert [left, top, width, height] in pixels to [x0, y0, x1, y1] in fractions of the frame.

    The box of an absent object has no area; `RowCleaner` skips its row.
    """
    left, top, box_width, box_height = box_px
    box = [left / width, top / height, (left + box_width) / width, (top + box_height) / height]
    return [round(value, 4) for value in box]


def _frames(folder: Path) -> list[Path]:
    # Hidden files are not frames; macOS writes metadata of 0.jpg into a file ._0.jpg.
    return sorted(
        path for path in folder.iterdir() if path.suffix in (".jpg", ".png") and not path.name.startswith(".")
    )


def _chosen_files(frames: list[Path]) -> list[str]:
    return [str(frame.absolute()) for frame in _choose_evenly(frames)]


def _choose_evenly(items: list[T]) -> list[T]:
    """Choose eight evenly spaced items, including the first and the last, by the rule that samples video frames."""
    return [items[index] for index in frames_on_screen(np.arange(len(items)), len(items), NUM_TRACKED_FRAMES)]
