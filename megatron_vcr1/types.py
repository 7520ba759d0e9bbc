"""Types that all packages share: spans of time, boxes, samples with their targets, and rollouts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

OPTION_LETTERS = "ABCDEFG"
"""Letters of multiple-choice options; the accuracy reward parses answers with the same letters."""

NUM_TRACKED_FRAMES = 8
"""Number of frames of a tracking sample in VideoChat-R1. Its answer has one box per frame."""


class Task(StrEnum):
    """The task of a sample; the value is the ``task`` of a manifest row."""

    TEMPORAL_GROUNDING = "temporal_grounding"
    TRACKING = "tracking"
    GROUNDED_QA = "grounded_qa"
    MULTIPLE_CHOICE_QA = "multiple_choice_qa"
    CAPTIONING = "captioning"
    QUALITY = "quality"


@dataclass(frozen=True, slots=True)
class Interval:
    """A span of time in a video, in seconds from its first frame.

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
        """Length in seconds."""
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
    """The target of temporal grounding: the span in which the queried event happens."""

    interval: Interval


@dataclass(frozen=True, slots=True)
class TrackingTarget:
    """The target of tracking: the object's box in each frame that the model sees.

    The prompt contains the first box, which tells the model which object to track.
    """

    boxes: tuple[Box, ...]

    def __post_init__(self) -> None:
        if len(self.boxes) < 2 or len(self.boxes) % 2:
            raise ValueError(
                f"tracking needs one box per frame of an even number of frames (they enter the model in pairs), "
                f"got {len(self.boxes)}"
            )


@dataclass(frozen=True, slots=True)
class ChoiceTarget:
    """The target of multiple-choice QA: the letter of the right option."""

    choice: str


@dataclass(frozen=True, slots=True)
class GroundedChoiceTarget:
    """The target of grounded QA: the letter of the right option, and the spans of time that contain the evidence."""

    choice: str
    intervals: tuple[Interval, ...]

    def __post_init__(self) -> None:
        if not self.intervals:
            raise ValueError("grounded QA needs at least one supporting interval")


@dataclass(frozen=True, slots=True)
class CaptionTarget:
    """The target of captioning: a reference caption and, if annotated, its atomic events."""

    caption: str
    events: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.caption.strip():
            raise ValueError("the reference caption is empty")


@dataclass(frozen=True, slots=True)
class QualityTarget:
    """The target of quality assessment: one of the labels that the query names."""

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
    """A video with a query and a target.

    Attributes:
        id: id, unique within a manifest.
        video: a video file, a folder of images, or the image files of the frames in order.
        target: ground truth; its type determines the task.
        query: the event to find, the name of the object to track, the question or the instruction. Only captioning may
            leave it empty.
        options: texts of the multiple-choice options in the order of their letters; empty for the other tasks.
        duration_s: length of the video in seconds (of the clip, if there is one); None if it is unknown.
        clip: the part of the video that is shown; None for the whole video. Times in `target` are
            measured from the clip's start.
        image_fps: images per second if `video` is a folder of images.
        category: the dataset's own category (question type, sub-task), for reports.
        thinking: reasoning that leads to the target, for SFT with thinking; empty if there is none.

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
        self._check_options()
        for interval in self.intervals:
            if self.duration_s is not None and interval.start_s >= self.duration_s:
                raise ValueError(f"interval starts at {interval.start_s} s, but the video ends at {self.duration_s} s")

    @property
    def task(self) -> Task:
        """The task, determined by the type of the target."""
        return _TASK_OF_TARGET[type(self.target)]

    @property
    def intervals(self) -> tuple[Interval, ...]:
        """Time spans of the target; empty for tasks without spans."""
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
    """The reason why a response ended."""

    STOP = "stop"
    """The policy ended the response: its last token is an end token, or its text ends with a stop string."""
    LENGTH = "length"
    """The response was cut at the token limit."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """A sampled response.

    Attributes:
        token_ids: sampled tokens including the end token, at least one.
        log_probs: log-probability of each token at the sampling temperature, over the whole vocabulary (before top-p
            and top-k).
        finish_reason: the reason why the response ended.
        policy_version: policy version of the weights that sampled it: their number of training steps.
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
    """The sampled responses to a prompt.

    Attributes:
        id: id of the sample.
        rollouts: the responses.
        cached_tokens: number of prompt tokens that the engine took from its prefix cache, for each response; None if
            the engine does not report it.
    """

    id: str
    rollouts: tuple[Rollout, ...]
    cached_tokens: tuple[int, ...] | None = None
