"""Cleaning of published annotations: a row with a problem is repaired, kept or skipped, and always reported.

The readers of the formats yield unchecked rows with the keys of a manifest, with two exceptions: ``video`` is the name
that the dataset uses, and a choice may be given as ``target.answer``, the text of the right option.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, Literal

import fsspec

from megatron_vcr1.data.importers.durations import DurationProbe
from megatron_vcr1.data.importers.files import Row
from megatron_vcr1.data.paths import is_remote
from megatron_vcr1.data.rows import sample_from_row
from megatron_vcr1.data.video import VideoError
from megatron_vcr1.data.video_images import IMAGE_SUFFIXES
from megatron_vcr1.tasks import find_task
from megatron_vcr1.tasks.row_fields import RowError
from megatron_vcr1.types import OPTION_LETTERS, Sample

Action = Literal["skipped", "repaired", "kept"]
Kind = Literal["video", "image"]
_KINDS: tuple[Kind, ...] = ("video", "image")

_VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")
"""Suffixes that are tried for the name of a video without one."""
_KNOWN_SUFFIXES = {
    *_VIDEO_SUFFIXES,
    *IMAGE_SUFFIXES,
    *(".3gp", ".avif", ".flv", ".gif", ".m2ts", ".m4v", ".mpeg", ".mpg", ".ogv", ".tif", ".tiff", ".ts", ".wmv"),
}

_MAX_COORDINATE = 2.0
"""Largest coordinate of a box, in fractions of the frame, that is taken for a box beyond the frame's edge. Cut there, a
box in pixels would become the whole frame."""


@dataclass(frozen=True, slots=True)
class Issue:
    """A problem of a published row.

    Attributes:
        row_id: id of the row.
        problem: kind of the problem, for example `missing_video`.
        detail: description in words.
        action: whether the row was skipped, repaired or kept as it is.
    """

    row_id: str
    problem: str
    detail: str
    action: Action


class SkipRow(Exception):
    """Raised for a row that cannot become a sample."""

    def __init__(self, problem: str, detail: str) -> None:
        super().__init__(f"{problem}: {detail}")
        self.problem = problem
        self.detail = detail


@dataclass(frozen=True)
class VideoFolder:
    """The folder of a dataset's videos and images.

    Attributes:
        root: a folder or an fsspec URL. None leaves names as published, without checking that the files exist.
    """

    root: str | None = None

    def find(self, name: str, kind: Kind = "video") -> str | None:
        """Find a video or an image; return its absolute path or URL, or None if it does not exist.

        A name without a known suffix is tried with those of its kind. A copy without the published subfolders is also
        found. Without a root, the bare name of a video gets the suffix .mp4.
        """
        known = PurePosixPath(name).suffix.lower() in _KNOWN_SUFFIXES
        if self.root is None:
            return name if known or "/" in name or kind == "image" else name + _VIDEO_SUFFIXES[0]
        suffixes = _VIDEO_SUFFIXES if kind == "video" else IMAGE_SUFFIXES
        root = self.root if is_remote(self.root) else os.path.abspath(self.root)
        for relative in dict.fromkeys([name, PurePosixPath(name).name]):
            for suffix in ("",) if known else (*suffixes, ""):
                path = os.path.join(root, relative + suffix)  # join() returns an absolute name unchanged
                if _exists(path):
                    return path
        return None


@dataclass
class RowCleaner:
    """Converts raw rows to samples and collects every issue.

    Attributes:
        videos: folder of the rows' videos.
        keep_overruns: whether spans that end after the video stay as annotated, as published scores count them.
            Otherwise they are cut at the end of the video.
        durations: measures the videos of rows that state no duration; None leaves those unknown.
        issues: one entry per problem, in row order.
    """

    videos: VideoFolder
    keep_overruns: bool = False
    durations: DurationProbe | None = None
    issues: list[Issue] = field(default_factory=list)

    def clean(self, row: Row) -> Sample | None:
        """Convert a row to a sample; return None if the row is skipped, with the reason added to `issues`.

        Raises:
            KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError: a value of the row is missing,
                or of another type than its format has.
        """
        row_id = str(row["id"])
        notes: list[Issue] = []
        try:
            row = {**row, "target": dict(row["target"])}
            if not isinstance(row.get("duration_s"), int | float | None):
                raise TypeError(f"the duration {row['duration_s']!r:.100} is not a number")
            if find_task(row["task"]).needs_query and not row["query"].strip():
                raise SkipRow("empty_query", "the query is empty")
            for kind in _KINDS:
                if row.get(kind) is not None:
                    row[kind] = self._found(row[kind], kind)
                if isinstance(media := row.get(f"{kind}s"), list):
                    row[f"{kind}s"] = [self._found(medium, kind) for medium in media]
            if self.durations is not None and row["duration_s"] is None and row.get("video") is not None:
                row["duration_s"] = _measure(self.durations, row)
            notes += self._clean_intervals(row_id, row)
            notes += _clean_boxes(row_id, row["target"])
            notes += _clean_choice(row_id, row)
            notes += _unusual_row_issues(row_id, row)
            sample = sample_from_row(row)
        except SkipRow as skip:
            self.issues.append(Issue(row_id, skip.problem, skip.detail, "skipped"))
            return None
        except RowError as error:
            self.issues.append(Issue(row_id, "invalid_row", str(error), "skipped"))
            return None
        self.issues.extend(notes)
        return sample

    def _found(self, medium: Any, kind: Kind) -> Any:
        """Replace the names in a video or image by paths; a video may be an object, or a list of its frames' images."""
        if isinstance(medium, list):
            return [self._found(frame, "image") for frame in medium]
        if isinstance(medium, dict):
            return {**medium, "video": self._found(medium["video"], "video")}
        path = self.videos.find(medium, kind)
        if path is None:
            raise SkipRow(f"missing_{kind}", f"{medium} does not exist in {self.videos.root}")
        return path

    def _clean_intervals(self, row_id: str, row: Row) -> list[Issue]:
        """Repair the target's spans in place. An unusable span is removed; a row without a usable span is skipped."""
        target = row["target"]
        key = "interval" if "interval" in target else "intervals"
        if key not in target:
            return []
        raw_spans = [target[key]] if key == "interval" else target[key]
        issues, spans = [], []
        for raw_span in raw_spans:
            try:
                span, notes = _clean_span(raw_span, row["duration_s"], self.keep_overruns)
            except SkipRow as skip:
                if len(raw_spans) == 1:
                    raise
                issues.append(Issue(row_id, skip.problem, f"{skip.detail}; this span was removed", "repaired"))
            else:
                spans.append(span)
                shown = f"{raw_span} s of {row['duration_s']} s"
                issues += [Issue(row_id, problem, shown, action) for problem, action in notes]
        if not spans:
            raise SkipRow("no_usable_span", f"none of {raw_spans} can be used")
        target[key] = spans[0] if key == "interval" else spans
        return issues


def _measure(durations: DurationProbe, row: Row) -> float | None:
    """Return the duration of a row's video, or of its clip; None if it cannot be known."""
    if isinstance(row["video"], list):
        return None
    try:
        duration_s = durations.duration_s(row["video"], row.get("image_fps"))
    except VideoError as error:
        raise SkipRow("unreadable_video", str(error)) from None
    if duration_s is None or row.get("clip") is None:
        return duration_s
    start_s, end_s = row["clip"]
    if start_s >= duration_s:
        raise SkipRow("clip_after_end", f"{row['clip']} s of {duration_s} s")
    return min(end_s, duration_s) - start_s


def _clean_span(
    span: list[float], duration_s: float | None, keep_overruns: bool
) -> tuple[list[float], list[tuple[str, Action]]]:
    """Cut a span to the video; return it with its problems as (problem, action).

    Raises:
        SkipRow: the span is empty or inverted, or starts after the end of the video.
    """
    start_s, end_s = span
    for value in (start_s, end_s):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"the span {span!r:.100} is not two numbers")
    notes: list[tuple[str, Action]] = []
    if start_s >= end_s:
        raise SkipRow("empty_span" if start_s == end_s else "inverted_span", f"{span} s")
    if duration_s is not None and start_s >= duration_s:
        raise SkipRow("span_after_end", f"{span} s of {duration_s} s")
    if start_s < 0:
        start_s = 0.0
        notes.append(("negative_start", "repaired"))
    if duration_s is not None and end_s > duration_s:
        end_s = end_s if keep_overruns else duration_s
        notes.append(("span_past_end", "kept" if keep_overruns else "repaired"))
    return [start_s, end_s], notes


def _clean_boxes(row_id: str, target: Row) -> list[Issue]:
    """Cut boxes at the frame's edges; a row with a box outside of the frame, or in pixels, is skipped."""
    notes: list[Issue] = []
    for index, box in enumerate(target.get("boxes", [])):
        if max(box) > _MAX_COORDINATE:
            raise SkipRow("box_in_pixels", f"box {index} is {box}; divide it by the frame's width and height")
        inside = [min(max(value, 0.0), 1.0) for value in box]
        if not (inside[0] < inside[2] and inside[1] < inside[3]):
            raise SkipRow("empty_box", f"box {index} is {box}")
        if inside != box:
            notes.append(Issue(row_id, "box_outside_frame", f"box {index} is {box}", "repaired"))
            target["boxes"] = [*target["boxes"][:index], inside, *target["boxes"][index + 1 :]]
    return notes


def _clean_choice(row_id: str, row: Row) -> list[Issue]:
    """Replace an answer that is given as text by the letter of its option."""
    if "answer" not in row["target"] or not row.get("options"):
        return []
    answer, options = row["target"].pop("answer"), row["options"]
    letters = [letter for letter, option in zip(OPTION_LETTERS, options, strict=False) if option == answer]
    if not letters:
        raise SkipRow("answer_not_in_options", f"{answer!r} is not one of {options}")
    row["target"]["choice"] = letters[0]
    if len(letters) == 1:
        return []
    detail = f"{answer!r} is the text of options {', '.join(letters)}; {letters[0]} is used"
    return [Issue(row_id, "ambiguous_answer", detail, "kept")]


def _unusual_row_issues(row_id: str, row: Row) -> list[Issue]:
    """Report rows that are kept unchanged, but are unusual enough to matter for the interpretation of scores."""
    if row["target"].get("events") == []:
        return [Issue(row_id, "no_events", "the annotated list of events is empty", "kept")]
    if len(row.get("options", ())) == 1:
        return [Issue(row_id, "single_option", f"the only option is {row['options'][0]!r}", "kept")]
    return []


def _exists(path: str) -> bool:
    return _remote_exists(path) if is_remote(path) else os.path.exists(path)


@lru_cache(maxsize=1 << 16)
def _remote_exists(url: str) -> bool:
    file_system, inner_path = fsspec.core.url_to_fs(url)
    return bool(file_system.exists(inner_path))
