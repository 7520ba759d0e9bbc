"""Tracking: GOT-10k, from its sequence folders or from VideoChat-R1's JSON file with eight boxes per sequence."""

from __future__ import annotations

import configparser
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
from PIL import Image

from megatron_vcr1.data.images import IMAGE_FORMATS
from megatron_vcr1.data.importers.cleaning import Issue, VideoFolder
from megatron_vcr1.data.importers.files import (
    MALFORMED,
    MalformedRow,
    Row,
    convert_rows,
    describe,
    read_json_list,
    read_lines,
)
from megatron_vcr1.data.paths import is_remote
from megatron_vcr1.data.video_images import list_images
from megatron_vcr1.data.video_types import frames_on_screen
from megatron_vcr1.errors import UserError
from megatron_vcr1.text_files import open_regular, read_text
from megatron_vcr1.types import NUM_TRACKED_FRAMES

T = TypeVar("T")


def read_got10k(
    annotations: tuple[Path, ...], videos: VideoFolder, split: str | None
) -> Iterator[Row | Issue | MalformedRow]:
    """Read GOT-10k: sequence folders, or a JSON list of ``path``, ``object`` and ``gt`` (boxes in fractions).

    Of a sequence folder, eight evenly spaced frames are used, including the first and the last one. Frames without a
    box, in which the object is out of sight, are left out first. Of the JSON file, see `_start_and_seven`. Frames are
    in natural order of their names: 2.jpg comes before 10.jpg.
    """
    for path in annotations:
        if path.suffix == ".json":
            yield from _read_boxes_json(path, videos)
        else:
            yield from _read_sequences(path if split is None else path / split)


def _read_boxes_json(path: Path, videos: VideoFolder) -> Iterator[Row | Issue | MalformedRow]:
    if videos.root is not None and is_remote(videos.root):
        raise UserError(f"--videos {videos.root}: the frames of each sequence must be listed; name a local folder")
    rows: Iterator[Row | Issue | MalformedRow] = convert_rows(
        read_json_list(path),
        lambda entry: _boxes_row(entry, videos),
        lambda entry: PurePosixPath(entry["path"]).name,
    )
    yield from rows


def _boxes_row(entry: Row, videos: VideoFolder) -> Row | Issue:
    name = PurePosixPath(entry["path"]).name
    if len(entry["gt"]) != NUM_TRACKED_FRAMES:
        raise ValueError(f"{len(entry['gt'])} boxes, but tracking needs {NUM_TRACKED_FRAMES}")
    folder = videos.find(name) if videos.root is not None else None
    frames = list_images(Path(folder)) if folder is not None else []
    if folder is not None and len(frames) < NUM_TRACKED_FRAMES - 1:
        detail = f"{folder} has {len(frames)} images, but tracking needs {NUM_TRACKED_FRAMES - 1}"
        return Issue(name, "too_few_frames", detail, "skipped")
    return {
        "id": name,
        "task": "tracking",
        # Without the frames' files, the sample can be scored, but it cannot be read.
        "video": _absolute(_start_and_seven(frames)) if frames else f"{name}/",
        "duration_s": None,
        "query": entry["object"],
        "target": {"boxes": entry["gt"]},
    }


def _read_sequences(folder: Path) -> Iterator[Row | Issue | MalformedRow]:
    sequences = sorted(
        truth.parent for truth in folder.glob("*/groundtruth.txt") if not truth.parent.name.startswith(".")
    )
    if not sequences:
        raise UserError(f"{folder}: no sequence folders with a groundtruth.txt; name the folder of a split")
    for sequence in sequences:
        try:
            yield from _sequence_rows(sequence)
        except (*MALFORMED, configparser.Error, OSError) as error:  # a UserError is a ValueError, too
            yield MalformedRow(sequence.name, describe(error))


def _sequence_rows(sequence: Path) -> list[Row | Issue]:
    """Read the folder of a sequence; return its row and what is noteworthy about it.

    Files of the folder that are malformed raise errors of many types.
    """
    frames = list_images(sequence)
    boxes_px = _boxes_px(sequence / "groundtruth.txt")
    if len(boxes_px) != len(frames):
        detail = f"{len(frames)} images and {len(boxes_px)} boxes (a test split publishes the first box only)"
        return [Issue(sequence.name, "incomplete_sequence", detail, "skipped")]
    absence = _absence(sequence / "absence.label", len(frames))
    if len(absence) != len(frames):
        detail = f"{len(frames)} images, but absence.label has {len(absence)} lines"
        return [Issue(sequence.name, "incomplete_sequence", detail, "skipped")]
    has_box = [not absent and _has_area(box) for absent, box in zip(absence, boxes_px, strict=True)]
    visible = [index for index, is_visible in enumerate(has_box) if is_visible]
    if len(visible) < NUM_TRACKED_FRAMES:
        detail = f"{len(visible)} of {len(frames)} frames have a box, but tracking needs {NUM_TRACKED_FRAMES}"
        return [Issue(sequence.name, "too_few_frames", detail, "skipped")]
    notes: list[Row | Issue] = []
    if len(visible) < len(frames):
        detail = (
            f"the object is out of sight in {len(frames) - len(visible)} of {len(frames)} frames: they are left out"
        )
        notes = [Issue(sequence.name, "object_absent", detail, "repaired")]
    object_class, frames_per_second = _meta_info(sequence / "meta_info.ini")
    width, height = _image_size(frames[0])
    chosen = _choose_evenly(visible)
    row = {
        "id": sequence.name,
        "task": "tracking",
        "video": _absolute([frames[index] for index in chosen]),
        "duration_s": len(frames) / frames_per_second,
        "query": object_class,
        "target": {"boxes": [_box_in_fractions(boxes_px[index], width, height) for index in chosen]},
    }
    return [*notes, row]


def _boxes_px(path: Path) -> list[list[float]]:
    """Read groundtruth.txt: [left, top, width, height] in pixels for each frame."""
    boxes = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            left, top, width, height = map(float, line.replace(",", " ").split())
        except ValueError:
            raise ValueError(f"groundtruth.txt, line {number}: {line!r:.80} is not left,top,width,height") from None
        boxes.append([left, top, width, height])
    return boxes


def _image_size(file: str) -> tuple[int, int]:
    """Return width and height of an image from its header."""
    try:
        with open(open_regular(file), "rb") as stream, Image.open(stream, formats=IMAGE_FORMATS) as image:
            return image.size
    except (OSError, Image.DecompressionBombError):
        raise ValueError(f"{file}: not an image that can be read") from None


def _absence(path: Path, num_frames: int) -> list[bool]:
    """Return for each line of absence.label whether the object is out of sight; all False without the file."""
    if not path.exists():
        return [False] * num_frames
    absent = {"0": False, "1": True}
    lines = [line.strip() for line in read_lines(path)]
    for number, line in enumerate(lines, start=1):
        if line not in absent:
            raise ValueError(f"absence.label, line {number}: {line!r} is neither 0 nor 1")
    return [absent[line] for line in lines]


def _meta_info(path: Path) -> tuple[str, float]:
    """Return the class of the object and the frame rate."""
    # Without interpolation, in which a percent sign, as in a URL, has a meaning of its own.
    parser = configparser.ConfigParser(interpolation=None)
    parser.read_string(read_text(path), source=str(path))
    meta = parser["METAINFO"]
    try:
        frames_per_second = float(meta["anno_fps"].lower().removesuffix("hz"))
    except ValueError:
        frames_per_second = math.nan
    if not 0 < frames_per_second < math.inf:  # NaN compares false
        raise ValueError(f"meta_info.ini: anno_fps is {meta['anno_fps']!r}, which is not a positive number")
    return meta["object_class"], frames_per_second


def _has_area(box_px: list[float]) -> bool:
    """Whether [left, top, width, height] is a box. Some annotators write NaN or no size where the object is absent."""
    return all(map(math.isfinite, box_px)) and box_px[2] > 0 and box_px[3] > 0


def _box_in_fractions(box_px: list[float], width: int, height: int) -> list[float]:
    """Convert [left, top, width, height] in pixels to [x0, y0, x1, y1] in fractions of the frame.

    The box of an absent object has no area; `RowCleaner` skips its row.
    """
    left, top, box_width, box_height = box_px
    box = [left / width, top / height, (left + box_width) / width, (top + box_height) / height]
    return [round(value, 4) for value in box]


def _absolute(files: list[str]) -> list[str]:
    return [str(Path(file).absolute()) for file in files]


def _start_and_seven(frames: list[T]) -> list[T]:
    """Choose the frames of the eight boxes in VideoChat-R1's JSON file: the start, and seven evenly spaced frames.

    The first box is the start box that the prompt states, and the other seven belong to the frames 0, int((n - 1) / 6),
    ..., n - 1 of the sequence. The first frame is therefore listed twice: the model sees one frame for each box.
    """
    step = (len(frames) - 1) / (NUM_TRACKED_FRAMES - 2)
    evenly_spaced = [frames[int(index * step)] for index in range(NUM_TRACKED_FRAMES - 2)]
    return [frames[0], *evenly_spaced, frames[-1]]


def _choose_evenly(items: list[T]) -> list[T]:
    """Choose eight evenly spaced items, including the first and the last, by the rule that samples video frames."""
    return [items[index] for index in frames_on_screen(np.arange(len(items)), len(items), NUM_TRACKED_FRAMES)]
