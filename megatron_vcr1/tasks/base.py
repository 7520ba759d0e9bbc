"""The interface of a task: all that the package needs to know of a kind of sample."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from typing import Any, ClassVar, Generic, Literal, TypeVar, cast

from megatron_vcr1.errors import UserError
from megatron_vcr1.rewards.answer_parsing import is_tagged
from megatron_vcr1.rewards.formats import blocks_fault
from megatron_vcr1.rewards.parsing import UnparsableError
from megatron_vcr1.tasks.metrics import SampleMetrics
from megatron_vcr1.tasks.row_fields import RowError, TargetField, shown
from megatron_vcr1.types import MARKS, OPTION_LETTERS, Box, Interval, RewardPart, Sample, Target

T = TypeVar("T", bound=Target)


@dataclass(frozen=True, slots=True)
class NumberFormat:
    """How prompts and target texts write numbers.

    Attributes:
        time_decimals: number of decimals of seconds.
        coordinate_decimals: number of decimals of box coordinates.
        trim_coordinates: whether zeros at the end of box coordinates are left out, as in 0.0 and 0.25.
    """

    time_decimals: int = 2
    coordinate_decimals: int = 3
    trim_coordinates: bool = False

    def seconds(self, value_s: float) -> str:
        """Format a time in seconds."""
        return f"{value_s:.{self.time_decimals}f}"

    def box(self, box: Box) -> str:
        """Format a box as [x0, y0, x1, y1]."""
        return f"[{', '.join(map(self._coordinate, (box.x0, box.y0, box.x1, box.y1)))}]"

    def _coordinate(self, value: float) -> str:
        text = f"{value:.{self.coordinate_decimals}f}"
        if not self.trim_coordinates or "." not in text:
            return text
        digits = text.rstrip("0")
        return f"{digits}0" if digits.endswith(".") else digits


@dataclass(frozen=True, slots=True)
class Reference:
    """The description that a judge compares completions with.

    Attributes:
        text: the description.
        events: its atomic events; empty if the judge has to extract them.
    """

    text: str
    events: tuple[str, ...] = ()


class Task(ABC, Generic[T]):
    """A task: how its samples are written, asked, answered, rewarded, measured and drawn.

    A task is a class of its own with one instance. Creating the instance connects the target's dataclass with it:
    `target.task` is the instance.

    Attributes:
        name: the ``task`` of a manifest row; a word of lower-case letters, digits and underscores.
        target_type: the dataclass of its targets, derived from `Target`.
        target_fields: the keys of a target in a manifest.
        answer_prompt: the default prompt that asks for the answer alone.
        think_prompt: the default prompt that asks for reasoning in ``<think>`` before the answer.
        tags: the blocks of a completion after ``<think>``, in order.
        needs_query: whether `query` must not be empty.
        needs_media: the media that a sample must have: "one video" (images may be added), "some", or None for a task
            whose samples may be text alone.
        has_options: whether samples have options.
        more_placeholders: (name, meaning) of the placeholders of the prompts besides $query and $options.
    """

    name: ClassVar[str]
    target_type: ClassVar[type[Target]]
    target_fields: ClassVar[tuple[TargetField, ...]]
    answer_prompt: ClassVar[str]
    think_prompt: ClassVar[str]
    tags: ClassVar[tuple[str, ...]] = ("answer",)
    needs_query: ClassVar[bool] = True
    needs_media: ClassVar[Literal["one video", "some"] | None] = None
    has_options: ClassVar[bool] = False
    more_placeholders: ClassVar[tuple[tuple[str, str], ...]] = ()

    def __init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"the name of a task, {self.name!r}, is not a word of lower-case letters and digits")
        if not self.tags:
            raise ValueError(f"{self.name}: tags is empty; a completion needs a block, such as 'answer'")
        for key in ("answer_prompt", "think_prompt"):
            self.checked_template(getattr(self, key), f"{self.name}.{key}")
        owner = vars(self.target_type).get("task", self)
        if owner.name != self.name:
            raise TypeError(f"{self.target_type.__name__} belongs to the task {owner.name}; derive a class of its own")
        self.target_type.task = self

    # Samples and manifests

    def target_of(self, sample: Sample) -> T:
        """Return the target of a sample of this task."""
        assert isinstance(sample.target, self.target_type), f"sample {sample.id} is of task {sample.task}"
        return cast(T, sample.target)

    def check_sample(self, sample: Sample) -> None:
        """Raise ValueError if a field of a sample contradicts the task; the message names the field."""
        if self.needs_query and not sample.query.strip():
            raise ValueError(f"query is empty; {self.name} needs one")
        if self.needs_media == "one video" and sample.video is None:
            raise ValueError(f"{self.name} needs exactly one video, but there are {len(sample.videos) or 'none'}")
        if self.needs_media == "some" and not sample.media:
            raise ValueError(f"{self.name} needs a video or an image, but there is none")
        if not self.has_options:
            if sample.options:
                raise ValueError(f"options are given, but {self.name} has none")
        elif not 1 <= len(sample.options) <= len(OPTION_LETTERS):
            raise ValueError(f"options: need 1 to {len(OPTION_LETTERS)}, got {len(sample.options)}")

    def target_from_json(self, value: object) -> T:
        """Convert the ``target`` of a manifest row.

        Raises:
            RowError: the message names the key.
            ValueError: a check of `target_type` failed.
        """
        if not isinstance(value, dict):
            raise RowError(f"key 'target': expected an object, got {shown(value)}")
        fields = {field.key: field for field in self.target_fields}
        for key, field in fields.items():
            if key not in value and field.required:
                raise RowError(f"key 'target.{key}' is missing; {self.name} needs it")
        if unknown := [key for key in value if key not in fields]:
            raise RowError(f"key 'target.{unknown[0]}' is unknown; a {self.name} target holds {', '.join(fields)}")
        read = {key: fields[key].form.read(item, f"target.{key}") for key, item in value.items()}
        return cast(T, self.target_type(**read))

    def target_to_json(self, target: T) -> dict[str, Any]:
        """Convert a target to the ``target`` of a manifest row; the inverse of `target_from_json`.

        Values that are None are left out.
        """
        values = {field: getattr(target, field.key) for field in self.target_fields}
        return {field.key: field.form.write(value) for field, value in values.items() if value is not None}

    # Prompts and videos

    @property
    def required_placeholders(self) -> frozenset[str]:
        """Placeholders that every prompt must have, because a prompt without them would not state the sample."""
        return frozenset((["query"] if self.needs_query else []) + (["options"] if self.has_options else []))

    @property
    def optional_placeholders(self) -> frozenset[str]:
        """Placeholders that a prompt may have."""
        names = [name for name, _ in self.more_placeholders]
        return frozenset(names if self.needs_query else [*names, "query"])

    def checked_template(self, text: object, where: str) -> Template:
        """Return the template of a prompt of this task.

        Args:
            text: the template's text.
            where: where the text comes from, for error messages.

        Raises:
            UserError: it is not a text, has a mark or a stray dollar sign, or its placeholders are not the task's.
        """
        if not isinstance(text, str):
            raise UserError(f"{where} must be a string")
        template = Template(text.strip())
        if not template.is_valid():
            raise UserError(f"{where} has a stray dollar sign; write $$ for a literal one")
        if mark := next((mark for mark in MARKS if mark in text), None):
            raise UserError(f"{where} contains {mark}; only the query and the options of a sample mark places of media")
        names = [match["named"] or match["braced"] for match in template.pattern.finditer(template.template)]
        if missing := sorted(self.required_placeholders - set(names)):
            raise UserError(f"{where}: placeholder '{missing[0]}' is missing")
        allowed = self.required_placeholders | self.optional_placeholders
        if unknown := sorted(set(filter(None, names)) - allowed):
            raise UserError(f"{where}: placeholder '{unknown[0]}' is unknown; known are {', '.join(sorted(allowed))}")
        # The marks of media must be in the prompt as in the sample: once, those of the query before those of options.
        marked = [name for name in names if name in ("query", "options")]
        if marked not in (["query", "options"], ["query"], ["options"], []):
            raise UserError(f"{where}: write $query once, and $options once after it")
        return template

    def placeholders(self, sample: Sample, numbers: NumberFormat) -> dict[str, str]:
        """Return the value of each placeholder that the prompt of a sample may use."""
        return self.query_placeholders(sample.query, sample.options, numbers)

    def query_placeholders(self, query: str, options: Sequence[str], numbers: NumberFormat) -> dict[str, str]:
        """Return the value of each placeholder that does not depend on a target, for a query without one."""
        values = {"query": query}
        if options:
            values["options"] = "\n".join(lettered_options(options))
        return values

    def video_options(self, sample: Sample) -> dict[str, float]:
        """Return options of `read_frames` for every video that the target determines, such as the number of frames."""
        return {}

    def frames_fault(self, sample: Sample, num_frames: int) -> str | None:
        """Return why a sample of one video cannot be used if the model sees `num_frames` frames; None if it can."""
        return None

    @abstractmethod
    def target_text(self, sample: Sample, numbers: NumberFormat) -> str:
        """Format the target as the prompt without thinking asks for it: the text that SFT trains on."""

    # Rewards and metrics

    def format_fault(self, sample: Sample, completion: str, *, thinking: bool) -> str | None:
        """Check the form of a completion; return a description of the fault, or None if the form is correct.

        A completion consists of blocks with only white space between them: ``<think>`` if thinking is on, and the
        task's `tags`. `check_answer_form` may ask for more.
        """
        if fault := blocks_fault(completion, ["think", *self.tags] if thinking else self.tags):
            return fault
        try:
            self.check_answer_form(sample, completion)
        except UnparsableError as unparsable:
            return str(unparsable)
        return None

    def check_answer_form(self, sample: Sample, completion: str) -> None:
        """Raise UnparsableError if the content of the blocks does not have the form that the prompt asks for.

        By default any content has.
        """

    @abstractmethod
    def reward_parts(self, sample: Sample, completion: str, judged: float | None) -> dict[str, RewardPart]:
        """Return all parts of the reward of a completion except the format, by name (`rewards.scoring.compute_part`).

        Args:
            judged: the judge's value in [0, 1], if the sample needs a judge; None without a verdict.
        """

    def metrics(self, sample: Sample, output: str) -> SampleMetrics:
        """Return the benchmark's metrics of an output, which may lack the tags that the prompt asks for.

        By default these are the parts of the reward. Samples that need a judge have `judged_metrics` instead.
        """
        parts = self.reward_parts(sample, output if is_tagged(output) else f"<answer>{output}</answer>", None)
        return SampleMetrics(
            {name: part.value for name, part in parts.items() if part.value is not None},
            {name: part.reason for name, part in parts.items() if part.reason},
        )

    def lenient_metrics(self, sample: Sample, output: str, frame_size: tuple[int, int] | None) -> SampleMetrics | None:
        """Return the main metrics of an output that is read leniently (`rewards.lenient`); None if there are none.

        They are reported as "NAME (lenient)" beside those of `metrics`.

        Args:
            frame_size: width and height in pixels of the frames that the model saw; None if unknown.
        """
        return None

    # Judge

    def needs_judge(self, sample: Sample) -> bool:
        """Return whether a judge has to decide on the completions of a sample."""
        return False

    def reference(self, sample: Sample) -> Reference:
        """Return what a judge compares the completions of a sample with."""
        raise ValueError(f"the task of sample {sample.id} is {self.name}, which needs no judge")

    def judged_metrics(self, recall: float, precision: float) -> SampleMetrics:
        """Return the benchmark's metrics of an output from the judge's verdicts.

        Args:
            recall: fraction of the reference's events that the output entails.
            precision: fraction of the output's events that the reference entails.
        """
        raise ValueError(f"{self.name} needs no judge")

    # Report

    def intervals(self, sample: Sample) -> tuple[Interval, ...]:
        """Return the time spans of a target; empty for tasks without spans."""
        return ()

    def boxes(self, sample: Sample) -> tuple[Box, ...]:
        """Return the box of each frame of a target; empty for tasks without boxes."""
        return ()

    def answered_intervals(self, sample: Sample, completion: str) -> tuple[Interval, ...]:
        """Return the time spans that a completion states. May raise UnparsableError."""
        return ()

    def answered_boxes(self, sample: Sample, completion: str) -> tuple[Box | None, ...]:
        """Return the box of each frame that a completion states; None for an invalid one. May raise UnparsableError."""
        return ()


def lettered_options(options: Sequence[str]) -> list[str]:
    """Return the options as prompts write them: ["(A) first", "(B) second"]."""
    return [f"({letter}) {text}" for letter, text in zip(OPTION_LETTERS, options, strict=False)]
