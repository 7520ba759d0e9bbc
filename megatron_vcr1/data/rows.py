"""Manifest rows: conversion of decoded JSON objects to samples and back, with all checks of a row.

A row holds ``id``, ``task``, ``video``, ``duration_s`` (null if unknown), ``query``, ``target`` and optionally
``options``, ``clip`` ([start_s, end_s]), ``image_fps`` (for a folder of images), ``category`` and ``thinking``
(reasoning for SFT). The keys of the target depend on the task:

==================  ============================================================
temporal_grounding  ``interval``: [start_s, end_s]
tracking            ``boxes``: [[x0, y0, x1, y1], ...], fractions of the frame
grounded_qa         ``choice``: a letter; ``intervals``: [[start_s, end_s], ...]
multiple_choice_qa  ``choice``: a letter
captioning          ``caption``: text; ``events``: [text, ...], optional
quality             ``label``: text
==================  ============================================================
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from megatron_vcr1.data.paths import is_remote
from megatron_vcr1.types import (
    Box,
    CaptionTarget,
    ChoiceTarget,
    GroundedChoiceTarget,
    GroundingTarget,
    Interval,
    QualityTarget,
    Target,
    Task,
    TrackingTarget,
    VideoSample,
)

_REQUIRED_KEYS = ("id", "task", "video", "duration_s", "target")
_OPTIONAL_KEYS = ("query", "options", "clip", "image_fps", "category", "thinking")

T = TypeVar("T")


class RowError(ValueError):
    """Raised for a manifest row that is not a valid sample; the message names the key and what to do."""


def sample_from_row(row: object, folder: Path | None = None) -> VideoSample:
    """Validate a row and convert it to a sample.

    Args:
        row: the decoded JSON value.
        folder: folder that a relative ``video`` is relative to; None leaves the path unchanged.

    Raises:
        RowError: the message names the key and what to do.
    """
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, got {_shown(row)}")
    for key in _REQUIRED_KEYS:
        if key not in row:
            raise RowError(f"key {key!r} is missing; add it")
    if unknown := [key for key in row if key not in _REQUIRED_KEYS + _OPTIONAL_KEYS]:
        known = ", ".join(_REQUIRED_KEYS + _OPTIONAL_KEYS)
        raise RowError(f"key {unknown[0]!r} is unknown; remove it or correct its name (known keys: {known})")
    try:
        task = Task(_text(row["task"], "task"))
    except ValueError as error:
        raise RowError(f"key 'task': {_shown(row['task'])} is not one of {', '.join(Task)}") from error
    try:
        return VideoSample(
            id=_text(row["id"], "id"),
            video=_video(row["video"], folder),
            target=_target(task, row["target"]),
            query=_text(row.get("query", ""), "query"),
            options=_list_of(_text, row.get("options", []), "options"),
            duration_s=None if row["duration_s"] is None else _number(row["duration_s"], "duration_s"),
            clip=None if row.get("clip") is None else _interval(row["clip"], "clip"),
            image_fps=None if row.get("image_fps") is None else _number(row["image_fps"], "image_fps"),
            category=_text(row.get("category", ""), "category"),
            thinking=_text(row.get("thinking", ""), "thinking"),
        )
    except RowError:
        raise
    except ValueError as error:  # a check of VideoSample or of a target
        raise RowError(f"{error}; correct the row") from error


def row_from_sample(sample: VideoSample, folder: Path | None = None) -> dict[str, Any]:
    """Convert a sample to a manifest row; the inverse of `sample_from_row`.

    Args:
        sample: the sample.
        folder: videos below this folder get relative paths.
    """
    row: dict[str, Any] = {
        "id": sample.id,
        "task": str(sample.task),
        "video": _relative_video(sample.video, folder),
        "duration_s": sample.duration_s,
        "query": sample.query,
        "target": _target_row(sample.target),
    }
    if sample.options:
        row["options"] = list(sample.options)
    if sample.clip is not None:
        row["clip"] = [sample.clip.start_s, sample.clip.end_s]
    if sample.image_fps is not None:
        row["image_fps"] = sample.image_fps
    if sample.category:
        row["category"] = sample.category
    if sample.thinking:
        row["thinking"] = sample.thinking
    return row


def _target(task: Task, value: object) -> Target:
    if not isinstance(value, dict):
        raise RowError(f"key 'target': expected an object, got {_shown(value)}")
    keys = _TARGET_KEYS[task]
    for key in keys:
        if key not in value and key != "events":
            raise RowError(f"key 'target.{key}' is missing; {task} needs it")
    if unknown := [key for key in value if key not in keys]:
        raise RowError(f"key 'target.{unknown[0]}' is unknown; a {task} target holds {', '.join(keys)}")
    match task:
        case Task.TEMPORAL_GROUNDING:
            return GroundingTarget(_interval(value["interval"], "target.interval"))
        case Task.TRACKING:
            return TrackingTarget(_list_of(_box, value["boxes"], "target.boxes"))
        case Task.GROUNDED_QA:
            intervals = _list_of(_interval, value["intervals"], "target.intervals")
            return GroundedChoiceTarget(_text(value["choice"], "target.choice"), intervals)
        case Task.MULTIPLE_CHOICE_QA:
            return ChoiceTarget(_text(value["choice"], "target.choice"))
        case Task.CAPTIONING:
            events = _list_of(_text, value.get("events", []), "target.events")
            return CaptionTarget(_text(value["caption"], "target.caption"), events)
        case Task.QUALITY:
            return QualityTarget(_text(value["label"], "target.label"))


_TARGET_KEYS: dict[Task, tuple[str, ...]] = {
    Task.TEMPORAL_GROUNDING: ("interval",),
    Task.TRACKING: ("boxes",),
    Task.GROUNDED_QA: ("choice", "intervals"),
    Task.MULTIPLE_CHOICE_QA: ("choice",),
    Task.CAPTIONING: ("caption", "events"),
    Task.QUALITY: ("label",),
}


def _target_row(target: Target) -> dict[str, Any]:
    match target:
        case GroundingTarget(interval):
            return {"interval": [interval.start_s, interval.end_s]}
        case TrackingTarget(boxes):
            return {"boxes": [[box.x0, box.y0, box.x1, box.y1] for box in boxes]}
        case GroundedChoiceTarget(choice, intervals):
            return {"choice": choice, "intervals": [[span.start_s, span.end_s] for span in intervals]}
        case ChoiceTarget(choice):
            return {"choice": choice}
        case CaptionTarget(caption, events):
            return {"caption": caption, "events": list(events)}
        case QualityTarget(label):
            return {"label": label}


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"key {key!r}: expected text, got {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair, which cannot be encoded
        raise RowError(f"key {key!r}: lone surrogate, half a character, at {error.start}; repair the text") from None
    return value


def _number(value: object, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f"key {key!r}: expected a number, got {_shown(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise RowError(f"key {key!r}: the number is too large") from error


def _list_of(read: Callable[[object, str], T], value: object, key: str) -> tuple[T, ...]:
    """Read a list; `read` converts each item, given the item and its key for error messages."""
    if not isinstance(value, list):
        raise RowError(f"key {key!r}: expected a list, got {_shown(value)}")
    return tuple(read(item, f"{key}[{index}]") for index, item in enumerate(value))


def _numbers(value: object, key: str, names: str) -> tuple[float, ...]:
    """Read a list of numbers, one for each of the comma-separated `names`."""
    if not isinstance(value, list) or len(value) != len(names.split(", ")):
        raise RowError(f"key {key!r}: expected [{names}], got {_shown(value)}")
    return tuple(_number(item, f"{key}[{index}]") for index, item in enumerate(value))


def _interval(value: object, key: str) -> Interval:
    start_s, end_s = _numbers(value, key, "start_s, end_s")
    try:
        return Interval(start_s, end_s)
    except ValueError as error:
        raise RowError(f"key {key!r}: {error}; correct the annotation") from error


def _box(value: object, key: str) -> Box:
    x0, y0, x1, y1 = _numbers(value, key, "x0, y0, x1, y1")
    try:
        return Box(x0, y0, x1, y1)
    except ValueError as error:
        raise RowError(f"key {key!r}: {error}; divide pixels by the frame's width and height") from error


def _video(value: object, folder: Path | None) -> str | tuple[str, ...]:
    if isinstance(value, list):
        return tuple(_resolved(path, folder) for path in _list_of(_text, value, "video"))
    if isinstance(value, str):
        return _resolved(value, folder)
    raise RowError(f"key 'video': expected a path or a list of frame images, got {_shown(value)}")


def _resolved(path: str, folder: Path | None) -> str:
    return path if folder is None or not path or is_remote(path) else os.path.join(folder, path)


def _relative_video(video: str | tuple[str, ...], folder: Path | None) -> str | list[str]:
    if isinstance(video, tuple):
        return [_relative_path(path, folder) for path in video]
    return _relative_path(video, folder)


def _relative_path(path: str, folder: Path | None) -> str:
    if folder is None or is_remote(path) or not Path(path).is_relative_to(folder):
        return path
    return str(Path(path).relative_to(folder))


def _shown(value: object) -> str:
    """Return a value as JSON for an error message, shortened to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."
