"""The reward of a completion: the sum of the parts that its task has (VideoChat-R1, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from megatron_vcr1.rewards.parsing import UnparsableError
from megatron_vcr1.types import RewardPart, Sample

FORMAT = "format"
"""Name of the part that every task has: 1 for a completion of the form that its prompt asks for, else 0."""

NOT_JUDGED = "not judged"
"""Reason reported for the part that a judge decides, if there is no verdict."""


@dataclass(frozen=True, slots=True)
class RewardBreakdown:
    """The reward of a completion, by part.

    Attributes:
        parts: value in [0, 1] of each part that the task has, the format first; None if it was not judged.
        reasons: the reason for each part that is 0 or was not judged, by name of the part. There is a small set of
            reasons, so that they can be counted.
        extra: values of user-defined rewards and penalties that the task does not have, by name.
        weights: weight of each part in the total, by name; a part that is not named has weight 1.
    """

    parts: Mapping[str, float | None]
    reasons: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def format(self) -> float:
        """1 if the completion has the form that its prompt asks for, else 0."""
        return self.parts[FORMAT] or 0.0

    @property
    def iou(self) -> float | None:
        """Overlap of spans or boxes; None if the task has no such part."""
        return self.parts.get("iou")

    @property
    def accuracy(self) -> float | None:
        """1 for the right option or label, else 0; None if the task has no such part."""
        return self.parts.get("accuracy")

    @property
    def recall(self) -> float | None:
        """Event recall of a caption; None if the task has no such part or it was not judged."""
        return self.parts.get("recall")

    @property
    def total(self) -> float | None:
        """The weighted sum of the parts; None if a part was not judged: a missing reward is not a low reward."""
        if None in self.parts.values():
            return None
        values = {**self.parts, **self.extra}
        return sum(self.weights.get(name, 1.0) * value for name, value in values.items() if value is not None)


def score(sample: Sample, completion: str, *, thinking: bool, judged: float | None = None) -> RewardBreakdown:
    """Compute the reward of a completion, which may be any text. A part that cannot be parsed is 0, with a reason.

    Intended differences from the paper or its published code:

    - Equation 3 gives 0 for a correct format. The text of the paper and its code give 1, and so does this function.
    - A block of the format may not contain tags, except that the reasoning may mention ``<answer>`` and ``<glue>``.
      The published format accepts a second ``<think>``, and two whole turns.
    - The last answer outside of the reasoning counts, for every task. The published reward also reads answers and glues
      within the reasoning, and all tasks except grounding read the first answer.
    - If a tag is opened again inside its block, the block starts at the last opening tag.
    - A list of (start, end) is read as the answer of grounding, as VideoChat-R1.5 asks for it; several answered or true
      spans are compared by the IoU of the time that they cover.
    - Any white space may surround "to" and "and", and may stand between the numbers of ``<glue>``.
    - Numbers include their sign and exponent and have ASCII digits only; a clock time (1:05) is not a number
      (`parse_interval`). A list of boxes contains decimal numbers only; the published reward evaluates it as Python.
    - An option is chosen by its letter or by its own text (`parse_choice`). The published reward takes the first of the
      characters A to G, which may be part of a word, and counts two empty answers as equal.
    - An empty list of spans scores 0. The published IoU of two empty lists is 1.
    - A box that is not within the frame scores 0. The published IoU also counts its part outside.
    - A tracking answer has as many boxes as there are frames. The published prompt shows 7 frames and asks for 8 boxes.

    Args:
        sample: the sample; its task defines the parts.
        completion: text of the response.
        thinking: whether the prompt asked for ``<think>``.
        judged: for samples that need a judge, its value: the event recall of a caption (`event_recall`). None means
            that there is no verdict; the total is then None. A completion without a caption has recall 0 in any case.

    Raises:
        ValueError: `judged` is outside [0, 1], or is given for a sample without a judge. No completion raises an error.
    """
    task = sample.target.task
    if judged is not None and not (task.needs_judge(sample) and 0 <= judged <= 1):
        raise ValueError(f"judged must be in [0, 1], for samples that need a judge only; got {judged} for {task.name}")
    fault = task.format_fault(sample, completion, thinking=thinking)
    parts = {FORMAT: RewardPart(0.0 if fault else 1.0, fault), **task.reward_parts(sample, completion, judged)}
    return RewardBreakdown(
        {name: part.value for name, part in parts.items()},
        {name: part.reason for name, part in parts.items() if part.reason},
    )


def compute_part(compute: Callable[[], float | None], zero_reason: str) -> RewardPart:
    """Compute a part of a reward.

    Args:
        compute: returns the value, or None if the part was not judged. If it raises `UnparsableError`, the part is 0
            and the message is the reason.
        zero_reason: the reason for any other 0.
    """
    try:
        value = compute()
    except UnparsableError as unparsable:
        return RewardPart(0.0, str(unparsable))
    if value is None:
        return RewardPart(None, NOT_JUDGED)
    return RewardPart(value, None if value > 0 else zero_reason)
