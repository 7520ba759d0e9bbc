"""The concepts that every part shares: spans of time, boxes, and a video with its question and its truth."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum

OPTION_LETTERS = "ABCDEFG"
"""Letters of multiple-choice options; the accuracy reward reads an answer with the same range."""

NUM_TRACKED_FRAMES = 8
"""Frames of a tracking video that the model sees, and boxes that it returns (VideoChat-R1)."""

_CONTROL_TOKEN = re.compile(r"<\|\w+\|>")


class Task(StrEnum):
    """What a sample asks of the model; the value is the manifest's ``task`` key."""

    TEMPORAL_GROUNDING = "temporal_grounding"
    TRACKING = "tracking"
    GROUNDED_QA = "grounded_qa"
    MULTIPLE_CHOICE_QA = "multiple_choice_qa"
    CAPTIONING = "captioning"
    QUALITY = "quality"


@dataclass(frozen=True, slots=True)
class Interval:
    """A span of video time, in seconds from the first frame.

    Raises:
        ValueError: unless 0 <= start_s < end_s, both finite.
    """

    start_s: float
    end_s: float

    def __post_init__(self) -> None:
        if not 0 <= self.start_s < self.end_s < math.inf:
            raise ValueError(f"an interval needs 0 <= start < end in seconds, got {self.start_s} to {self.end_s}")

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned box: left, top, right, bottom as fractions of the frame's width and height.

    Raises:
        ValueError: unless 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1.
    """

    x0: float
    y0: float
    x1: float
    y1: float

    def __post_init__(self) -> None:
        if not (0 <= self.x0 < self.x1 <= 1 and 0 <= self.y0 < self.y1 <= 1):
            raise ValueError(
                f"a box needs 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, got {[self.x0, self.y0, self.x1, self.y1]}"
            )


@dataclass(frozen=True, slots=True)
class GroundingTarget:
    """When the queried event happens."""

    interval: Interval


@dataclass(frozen=True, slots=True)
class TrackingTarget:
    """Where the object is in each of the frames that the model sees; the prompt gives the first box away."""

    boxes: tuple[Box, ...]

    def __post_init__(self) -> None:
        if len(self.boxes) < 2 or len(self.boxes) % 2:
            raise ValueError(
                f"tracking needs one box a frame of an even number of frames (they enter the model in pairs), "
                f"got {len(self.boxes)}"
            )


@dataclass(frozen=True, slots=True)
class ChoiceTarget:
    """The letter of the right option."""

    choice: str


@dataclass(frozen=True, slots=True)
class GroundedChoiceTarget:
    """The letter of the right option and the spans that support it."""

    choice: str
    intervals: tuple[Interval, ...]

    def __post_init__(self) -> None:
        if not self.intervals:
            raise ValueError("grounded QA needs at least one supporting interval")


@dataclass(frozen=True, slots=True)
class CaptionTarget:
    """A reference description and, where annotated, its atomic events."""

    caption: str
    events: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.caption.strip():
            raise ValueError("the reference caption is empty")


@dataclass(frozen=True, slots=True)
class QualityTarget:
    """The quality label, one of those that the query names."""

    label: str

    def __post_init__(self) -> None:
        if not self.label.strip():
            raise ValueError("the quality label is empty")


Target = GroundingTarget | TrackingTarget | GroundedChoiceTarget | ChoiceTarget | CaptionTarget | QualityTarget

_TASK_OF_TARGET: dict[type, Task] = {
    GroundingTarget: Task.TEMPORAL_GROUNDING,
    TrackingTarget: Task.TRACKING,
    GroundedChoiceTarget: Task.GROUNDED_QA,
    ChoiceTarget: Task.MULTIPLE_CHOICE_QA,
    CaptionTarget: Task.CAPTIONING,
    QualityTarget: Task.QUALITY,
}


@dataclass(frozen=True, slots=True)
class VideoSample:
    """One question about one video, with its truth.

    Attributes:
        id: unique within a manifest.
        video: a file, a folder of images, or the image files of the frames in order.
        target: the truth; its type decides the task.
        query: what is asked: the event to find, the name of the object to follow, the question, the instruction.
            Only captioning may leave it empty.
        options: texts of the multiple-choice options in letter order; empty for the other tasks.
        duration_s: length of the video (of the clip, if there is one); None if the annotation does not state it.
        clip: the part of the file that is shown, where the annotation restricts it; times in ``target`` count from
            its start.
        image_fps: images a second, where ``video`` is a folder of images.
        category: the dataset's own grouping (question type, sub-task), for reports.
        thinking: reasoning that leads to the target, for SFT with thinking; empty if the annotation has none.

    Raises:
        ValueError: a field contradicts the task or another field; the message names the field.
    """

    id: str
    video: str | tuple[str, ...]
    target: Target
    query: str = ""
    options: tuple[str, ...] = ()
    duration_s: float | None = None
    clip: Interval | None = None
    image_fps: float | None = None
    category: str = ""
    thinking: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("id is empty")
        if not self.video:
            raise ValueError("video is empty")
        if not self.query.strip() and self.task != Task.CAPTIONING:
            raise ValueError(f"query is empty; {self.task} needs one")
        if self.duration_s is not None and not 0 < self.duration_s < math.inf:
            raise ValueError(f"duration_s must be positive and finite, or null if unknown; got {self.duration_s}")
        if self.image_fps is not None and not 0 < self.image_fps < math.inf:
            raise ValueError(f"image_fps must be positive and finite, got {self.image_fps}")
        for text in (self.query, self.thinking, *self.options):
            if control_token := _CONTROL_TOKEN.search(text):
                raise ValueError(f"{control_token.group()} stands for something else than text to a model; remove it")
        self._check_options()
        for interval in self.intervals:
            if self.duration_s is not None and interval.start_s >= self.duration_s:
                raise ValueError(f"interval starts at {interval.start_s} s, after the video's {self.duration_s} s")

    @property
    def task(self) -> Task:
        return _TASK_OF_TARGET[type(self.target)]

    @property
    def intervals(self) -> tuple[Interval, ...]:
        """The target's spans; empty for tasks without any."""
        match self.target:
            case GroundingTarget(interval):
                return (interval,)
            case GroundedChoiceTarget(_, intervals):
                return intervals
        return ()

    def _check_options(self) -> None:
        if not isinstance(self.target, ChoiceTarget | GroundedChoiceTarget):
            if self.options:
                raise ValueError(f"options are given, but {self.task} has none")
            return
        if not 1 <= len(self.options) <= len(OPTION_LETTERS):
            raise ValueError(f"options: need 1 to {len(OPTION_LETTERS)}, got {len(self.options)}")
        letters = OPTION_LETTERS[: len(self.options)]
        if len(self.target.choice) != 1 or self.target.choice not in letters:
            raise ValueError(f"choice {self.target.choice!r} is not one of the options' letters {letters}")


class FinishReason(StrEnum):
    """Why a response ended."""

    STOP = "stop"
    """By itself: its last token is an end token, or it ends with a stop text."""
    LENGTH = "length"
    """Cut at the limit of tokens."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response.

    Attributes:
        token_ids: what was sampled, the end token included; at least one.
        log_probs: of each token, at the sampling temperature, over the whole vocabulary (before top-p and top-k).
        policy_version: how many weight updates the policy that sampled it had seen.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int

    def __post_init__(self) -> None:
        if not self.token_ids or len(self.token_ids) != len(self.log_probs):
            raise ValueError(f"a rollout of {len(self.token_ids)} tokens has {len(self.log_probs)} log-probs")


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The responses to one prompt.

    Attributes:
        id: the sample's.
        cached_tokens: prompt tokens of each response that the engine took from its cache instead of computing them;
            None if the engine does not tell.
    """

    id: str
    rollouts: tuple[Rollout, ...]
    cached_tokens: tuple[int, ...] | None = None
