"""Manifest rows: conversion of decoded JSON objects to samples and back, with all checks of a row.

A row holds ``id``, ``task``, ``video``, ``duration_s`` (null if unknown), ``query``, ``target`` and optionally
``options``, ``clip`` ([start_s, end_s]), ``image_fps`` (for a folder of images), ``category`` and ``thinking``
(reasoning for SFT). The task defines the keys of the target (`Task.target_fields`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megatron_vcr1.data.paths import is_remote
from megatron_vcr1.tasks import UnknownTaskError, find_task, task_of
from megatron_vcr1.tasks.row_fields import RowError, interval, items, number, shown, text
from megatron_vcr1.types import VideoSample

_REQUIRED_KEYS = ("id", "task", "video", "duration_s", "target")
_OPTIONAL_KEYS = ("query", "options", "clip", "image_fps", "category", "thinking")


def sample_from_row(row: object, folder: Path | None = None) -> VideoSample:
    """Validate a row and convert it to a sample.

    Args:
        row: the decoded JSON value.
        folder: folder that a relative ``video`` is relative to; None leaves the path unchanged.

    Raises:
        RowError: the message names the key and what to do.
    """
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, got {shown(row)}")
    for key in _REQUIRED_KEYS:
        if key not in row:
            raise RowError(f"key {key!r} is missing; add it")
    if unknown := [key for key in row if key not in _REQUIRED_KEYS + _OPTIONAL_KEYS]:
        known = ", ".join(_REQUIRED_KEYS + _OPTIONAL_KEYS)
        raise RowError(f"key {unknown[0]!r} is unknown; remove it or correct its name (known keys: {known})")
    try:
        task = find_task(text(row["task"], "task"))
    except UnknownTaskError as error:
        raise RowError(f"key 'task': {error}") from error
    try:
        return VideoSample(
            id=text(row["id"], "id"),
            video=_video(row["video"], folder),
            target=task.target_from_json(row["target"]),
            query=text(row.get("query", ""), "query"),
            options=items(text, row.get("options", []), "options"),
            duration_s=None if row["duration_s"] is None else number(row["duration_s"], "duration_s"),
            clip=None if row.get("clip") is None else interval(row["clip"], "clip"),
            image_fps=None if row.get("image_fps") is None else number(row["image_fps"], "image_fps"),
            category=text(row.get("category", ""), "category"),
            thinking=text(row.get("thinking", ""), "thinking"),
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
        "task": sample.task,
        "video": _relative_video(sample.video, folder),
        "duration_s": sample.duration_s,
        "query": sample.query,
        "target": task_of(sample).target_to_json(sample.target),
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


def _video(value: object, folder: Path | None) -> str | tuple[str, ...]:
    if isinstance(value, list):
        return tuple(_resolved(path, folder) for path in items(text, value, "video"))
    if isinstance(value, str):
        return _resolved(value, folder)
    raise RowError(f"key 'video': expected a path or a list of frame images, got {shown(value)}")


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
