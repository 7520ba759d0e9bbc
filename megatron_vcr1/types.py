"""Types that all packages share: spans of time, boxes, samples with their media and targets, and rollouts."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar, Literal, Protocol

OPTION_LETTERS = "ABCDEFG"
"""Letters of multiple-choice options; the accuracy reward parses answers with the same letters."""

NUM_TRACKED_FRAMES = 8
"""Number of frames of a tracking sample in VideoChat-R1. Its answer has one box per frame."""


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


class Target:
    """The ground truth of a sample. Each task derives a frozen dataclass with its annotations from it.

    Attributes:
        task: the task that the target belongs to; `megatron_vcr1.tasks.Task` sets it.
    """

    __slots__ = ()
    task: ClassVar[TaskRules]


@dataclass(frozen=True, slots=True)
class Video:
    """A video of a prompt.

    Attributes:
        path: a video file, a folder of images, or the image files of the frames in order.
        duration_s: length in seconds (of the clip, if there is one); None if it is unknown.
        clip: the part of the video that is shown; None for the whole video.
        image_fps: images per second if the video is a folder of images.

    Raises:
        ValueError: a field is not valid; the message names it.
    """

    path: str | tuple[str, ...]
    duration_s: float | None = None
    clip: Interval | None = None
    image_fps: float | None = None
    kind: ClassVar[Literal["video"]] = "video"

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("video is empty")
        if self.duration_s is not None and not 0 < self.duration_s < math.inf:
            raise ValueError(f"duration_s must be positive and finite, or null if unknown; got {self.duration_s}")
        if self.image_fps is not None and not 0 < self.image_fps < math.inf:
            raise ValueError(f"image_fps must be positive and finite, got {self.image_fps}")


@dataclass(frozen=True, slots=True)
class Image:
    """An image of a prompt: the path of its file. Raises ValueError if the path is empty."""

    path: str
    kind: ClassVar[Literal["image"]] = "image"

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("image is empty")


Medium = Video | Image

MARKS = {"<video>": "video", "<image>": "image"}
"""The texts that mark the place of a medium in a query, with the kind of the medium."""


def marked_kinds(text: str, media: Iterable[Medium]) -> list[str]:
    """Return the kinds of media whose places a text marks, "video" or "image", in order.

    `<video>` and `<image>` mark places. For a kind that `media` does not contain, they are ordinary text.
    """
    return [MARKS[part] for part in _split_at_marks(text, media) if part in MARKS]


def interleave(text: str, media: Sequence[Medium], *, text_first: bool = False) -> list[str | Medium]:
    """Return the parts of a prompt: all media before the text, or at the places that the text marks (`marked_kinds`).

    Args:
        text: the text of the prompt.
        media: its videos and images, in order.
        text_first: whether media come after the text, unless it marks their places.

    Raises:
        ValueError: the text marks the places of some media, but not of all of them in their order.
    """
    kinds = marked_kinds(text, media)
    if not kinds:
        return [text, *media] if text_first else [*media, text]
    if kinds != [medium.kind for medium in media]:
        raise ValueError(
            f"the query marks {', '.join(f'<{kind}>' for kind in kinds)}, but its media are {count_media(media)}; mark "
            "each of them once, in their order, or none"
        )
    next_medium = iter(media)
    parts = (next(next_medium) if part in MARKS else part for part in _split_at_marks(text, media))
    return [part for part in parts if part != ""]


def _split_at_marks(text: str, media: Iterable[Medium]) -> list[str]:
    marks = "|".join(f"<{kind}>" for kind in sorted({medium.kind for medium in media}))
    return re.split(f"({marks})", text) if marks else [text]


def count_media(media: Iterable[Medium]) -> str:
    """Describe the numbers of media, for example "2 videos, 1 image"; empty if there are none."""
    counts = Counter(medium.kind for medium in media)
    return ", ".join(f"{number} {kind}{'s' if number > 1 else ''}" for kind, number in sorted(counts.items())[::-1])


@dataclass(frozen=True, slots=True)
class Sample:
    """A query about videos and images, or about neither, with its target.

    Attributes:
        id: id, unique within a manifest.
        media: videos and images in the order of the prompt. They come before the text, unless `<video>` and `<image>`
            in the query or the options mark their places (`interleave`). Without marks, videos come before images.
        target: ground truth; its type determines the task. Times are measured from the start of the video or clip.
        query: the event to find, the name of the object to track, the question or the instruction; empty if the task
            needs none.
        options: texts of the multiple-choice options in the order of their letters; empty for the other tasks.
        category: the dataset's own category (question type, sub-task), for reports.
        thinking: reasoning that leads to the target, for SFT with thinking; empty if there is none.

    Raises:
        ValueError: a field contradicts the task or another field; the message names the field.
    """

    id: str
    media: tuple[Medium, ...]
    target: Target
    query: str = ""
    options: tuple[str, ...] = ()
    category: str = ""
    thinking: str = ""

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("id is empty")
        text, kinds = "\n".join((self.query, *self.options)), [medium.kind for medium in self.media]
        interleave(text, self.media)  # raises if marks and media do not match
        if not marked_kinds(text, self.media) and kinds != sorted(kinds, reverse=True):
            raise ValueError("an image comes before a video; mark their places with <image> and <video> in the query")
        self.target.task.check_sample(self)
        for interval in self.intervals:
            if self.duration_s is not None and interval.start_s >= self.duration_s:
                raise ValueError(f"interval starts at {interval.start_s} s, but the video ends at {self.duration_s} s")

    @property
    def videos(self) -> tuple[Video, ...]:
        """The videos, in the order of the prompt."""
        return tuple(medium for medium in self.media if isinstance(medium, Video))

    @property
    def images(self) -> tuple[Image, ...]:
        """The images, in the order of the prompt."""
        return tuple(medium for medium in self.media if isinstance(medium, Image))

    @property
    def video(self) -> Video | None:
        """The video of a sample that has exactly one; None for other samples."""
        return self.videos[0] if len(self.videos) == 1 else None

    @property
    def duration_s(self) -> float | None:
        """The length of `video` in seconds, if it is known."""
        return None if self.video is None else self.video.duration_s

    @property
    def task(self) -> str:
        """The name of the task, determined by the type of the target."""
        return self.target.task.name

    @property
    def intervals(self) -> tuple[Interval, ...]:
        """Time spans of the target; empty for tasks without spans."""
        return self.target.task.intervals(self)


@dataclass(frozen=True, slots=True)
class RewardPart:
    """A part of a reward: its value in [0, 1] and, if it is 0 or was not judged, the reason.

    Attributes:
        value: None if a judge has to decide and gave no verdict.
        reason: one of a small set of texts, so that they can be counted; None for other values.
    """

    value: float | None
    reason: str | None = None


class TaskRules(Protocol):
    """The part of a task that samples and rewards need. `megatron_vcr1.tasks.Task` is the whole interface."""

    @property
    def name(self) -> str:
        """The ``task`` of a manifest row."""
        ...

    def check_sample(self, sample: Sample) -> None:
        """Raise ValueError if a field of a sample contradicts the task; the message names the field."""
        ...

    def intervals(self, sample: Sample) -> tuple[Interval, ...]:
        """Return the time spans of a target; empty for tasks without spans."""
        ...

    def format_fault(self, sample: Sample, completion: str, *, thinking: bool) -> str | None:
        """Return what is wrong with the form of a completion; None if it has the form that the prompt asks for."""
        ...

    def needs_judge(self, sample: Sample) -> bool:
        """Return whether a judge has to decide on the completions of a sample."""
        ...

    def reward_parts(self, sample: Sample, completion: str, judged: float | None) -> Mapping[str, RewardPart]:
        """Return all parts of the reward of a completion except the format, by name.

        Args:
            judged: the judge's value, if the sample needs a judge; None without a verdict.
        """
        ...


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
