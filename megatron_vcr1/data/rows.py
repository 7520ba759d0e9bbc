"""Manifest rows: conversion of decoded JSON objects to samples and back, with all checks of a row.

`KEYS` describes the keys of a row. The task defines the keys of its target (`Task.target_fields`).

A row has ``video`` (with ``duration_s``, ``clip`` and ``image_fps``) or ``videos`` (a list of paths, or of objects with
these keys), and ``image`` or ``images`` (a list of paths). A row may have neither. The order in the prompt is that of
the marks ``<video>`` and ``<image>`` in the query and the options. Without marks, videos come before images.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vcr1.data.paths import is_remote
from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import UnknownTaskError, find_task, task_of
from megatron_vcr1.tasks.row_fields import RowError, interval, items, number, shown, text
from megatron_vcr1.types import Image, Medium, Sample, Video, marked_kinds


@dataclass(frozen=True, slots=True)
class RowKey:
    """A key of a row and its description for the documentation.

    Attributes:
        form: form of the value.
        required: "yes", or for which rows the key is required.
        meaning: meaning of the value.
    """

    name: str
    form: str
    required: str
    meaning: str


KEYS = (
    RowKey("id", "text", "yes", "unique in the file; names the sample in reports, logs and errors"),
    RowKey("task", "text", "yes", "the name of a task below, or of your own"),
    RowKey("target", "object", "yes", "the ground truth; its keys depend on the task"),
    RowKey(
        "video",
        "path, URL, or list of image paths",
        "for most tasks",
        "a video file, a folder of frame images, or the frames themselves; a relative path is relative to the "
        "manifest's folder",
    ),
    RowKey("duration_s", "number or null", "no", "duration of the video in seconds (of its clip, if there is one)"),
    RowKey(
        "clip", "`[start_s, end_s]`", "no", "the part of the video to use; times in the target count from its start"
    ),
    RowKey("image_fps", "number", "no", "frames per second of a folder of images"),
    RowKey("videos", "list", "no", "several videos, each a path or an object with the four keys above"),
    RowKey("image", "path or URL", "no", "an image"),
    RowKey("images", "list of paths or URLs", "no", "several images"),
    RowKey("query", "text", "for most tasks", "the event, object, question or instruction"),
    RowKey("options", "list of texts", "for multiple choice", "the options, without letters"),
    RowKey("category", "text", "no", "results are also reported per category"),
    RowKey("thinking", "text", "no", "a reasoning text for supervised fine-tuning with thinking"),
)
_REQUIRED_KEYS = tuple(key.name for key in KEYS if key.required == "yes")
_KNOWN_KEYS = tuple(key.name for key in KEYS)
_VIDEO_KEYS = ("video", "duration_s", "clip", "image_fps")


def sample_from_row(row: object, folder: Path | None = None) -> Sample:
    """Validate a row and convert it to a sample.

    Args:
        row: the decoded JSON value.
        folder: folder that relative paths are relative to; None leaves them unchanged.

    Raises:
        RowError: the message names the key and what to do.
    """
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, got {shown(row)}")
    for key in _REQUIRED_KEYS:
        if key not in row:
            raise RowError(f"key {key!r} is missing; add it")
    _check_known(row, "", _KNOWN_KEYS)
    try:
        task = find_task(text(row["task"], "task"))
    except UnknownTaskError as error:
        raise RowError(f"key 'task': {error}") from error
    try:
        query, options = text(row.get("query", ""), "query"), items(text, row.get("options", []), "options")
        return Sample(
            id=text(row["id"], "id"),
            media=_media(row, "\n".join((query, *options)), folder),
            target=task.target_from_json(row["target"]),
            query=query,
            options=options,
            category=text(row.get("category", ""), "category"),
            thinking=text(row.get("thinking", ""), "thinking"),
        )
    except (RowError, UserError):
        raise
    except ValueError as error:  # a check of Sample, of its media or of its target
        raise RowError(f"{error}; correct the row") from error


def row_from_sample(sample: Sample, folder: Path | None = None) -> dict[str, Any]:
    """Convert a sample to a manifest row; the inverse of `sample_from_row`.

    Args:
        sample: the sample.
        folder: videos and images below this folder get relative paths.
    """
    row: dict[str, Any] = {"id": sample.id, "task": sample.task}
    videos = [_video_row(video, folder) for video in sample.videos]
    images = [relative_path(image.path, folder) for image in sample.images]
    if len(videos) == 1:
        row |= {"video": videos[0].pop("video"), "duration_s": None, **videos[0]}
    elif videos:
        row["videos"] = videos
    if images:
        row |= {"image": images[0]} if len(images) == 1 else {"images": images}
    row |= {"query": sample.query, "target": task_of(sample).target_to_json(sample.target)}
    if sample.options:
        row["options"] = list(sample.options)
    if sample.category:
        row["category"] = sample.category
    if sample.thinking:
        row["thinking"] = sample.thinking
    return row


def _check_known(row: Mapping[str, object], where: str, known: Sequence[str]) -> None:
    if unknown := [key for key in row if key not in known]:
        raise RowError(
            f"key {where + unknown[0]!r} is unknown; remove it or correct its name (known keys: {', '.join(known)})"
        )


def _media(row: Mapping[str, Any], marked_text: str, folder: Path | None) -> tuple[Medium, ...]:
    """Read the videos and images of a row, in the order of the prompt. A key whose value is null counts as missing."""
    given = {key: value for key, value in row.items() if value is not None}
    for one, several in (("video", "videos"), ("image", "images")):
        if one in given and several in given:
            raise RowError(f"keys {one!r} and {several!r} contradict each other; put everything into {several!r}")
    for key in _VIDEO_KEYS[1:]:
        if key in given and "video" not in given:
            where = "into the items of 'videos'" if "videos" in given else "next to 'video', or remove it"
            raise RowError(f"key {key!r} describes the video of 'video', which is missing; put it {where}")
    videos: tuple[Video, ...] = ()
    if "video" in given:
        videos = (_video({key: given[key] for key in _VIDEO_KEYS if key in given}, "", folder),)
    elif "videos" in given:
        videos = items(lambda item, key: _video_item(item, key, folder), given["videos"], "videos")
    images: tuple[Image, ...] = ()
    if "image" in given:
        images = (_image(given["image"], "image", folder),)
    elif "images" in given:
        images = items(lambda item, key: _image(item, key, folder), given["images"], "images")
    kinds = marked_kinds(marked_text, (*videos, *images))
    if Counter(kinds) != Counter({"video": len(videos), "image": len(images)}):
        return (*videos, *images)  # no marks, or marks that Sample refuses
    next_video, next_image = iter(videos), iter(images)
    return tuple(next(next_video) if kind == "video" else next(next_image) for kind in kinds)


def _video_item(value: object, key: str, folder: Path | None) -> Video:
    """Read an item of ``videos``: a path, or an object."""
    if isinstance(value, str):
        return _video({"video": value}, f"{key}.", folder)
    if not isinstance(value, dict) or value.get("video") is None:
        raise RowError(f'key {key!r}: expected a path or {{"video": path}}, got {shown(value)}')
    _check_known(value, f"{key}.", _VIDEO_KEYS)
    return _video({name: item for name, item in value.items() if item is not None}, f"{key}.", folder)


def _video(value: Mapping[str, Any], where: str, folder: Path | None) -> Video:
    """Read a video; `value` has some of _VIDEO_KEYS, and `where` is what comes before them in error messages."""
    path = value["video"]
    if isinstance(path, list):
        path = tuple(_resolved(frame, folder) for frame in items(text, path, f"{where}video"))
    elif isinstance(path, str):
        path = _resolved(text(path, f"{where}video"), folder)
    else:
        raise RowError(f"key {where + 'video'!r}: expected a path or a list of frame images, got {shown(path)}")
    return Video(
        path,
        duration_s=number(value["duration_s"], f"{where}duration_s") if "duration_s" in value else None,
        clip=interval(value["clip"], f"{where}clip") if "clip" in value else None,
        image_fps=number(value["image_fps"], f"{where}image_fps") if "image_fps" in value else None,
    )


def _image(value: object, key: str, folder: Path | None) -> Image:
    return Image(_resolved(text(value, key), folder))


def _resolved(path: str, folder: Path | None) -> str:
    return path if folder is None or not path or is_remote(path) else os.path.join(folder, path)


def _video_row(video: Video, folder: Path | None) -> dict[str, Any]:
    """Convert a video to the keys of a row, without those that have no value."""
    path = video.path
    files = [relative_path(file, folder) for file in ([path] if isinstance(path, str) else path)]
    row = {
        "video": files[0] if isinstance(path, str) else files,
        "duration_s": video.duration_s,
        "clip": video.clip and [video.clip.start_s, video.clip.end_s],
        "image_fps": video.image_fps,
    }
    return {key: value for key, value in row.items() if value is not None}


def relative_path(path: str, folder: Path | None) -> str:
    """Return a path relative to a folder that it is below; other paths and URLs are returned unchanged."""
    if folder is None or is_remote(path) or not Path(path).is_relative_to(folder):
        return path
    return str(Path(path).relative_to(folder))
