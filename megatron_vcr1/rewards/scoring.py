"""The reward of a completion: the sum of the parts that its task has (VideoChat-R1, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from megatron_vcr1.rewards.formats import format_fault
from megatron_vcr1.rewards.overlap import mean_box_iou, span_union_iou, temporal_iou
from megatron_vcr1.rewards.parsing import (
    UnparsableError,
    first_glue,
    last_answer,
    parse_boxes,
    parse_caption,
    parse_choice,
    parse_interval,
    parse_spans,
)
from megatron_vcr1.types import (
    Box,
    CaptionTarget,
    ChoiceTarget,
    GroundedChoiceTarget,
    GroundingTarget,
    QualityTarget,
    TrackingTarget,
    VideoSample,
)

NOT_JUDGED = "not judged"
"""Reason reported for the recall of a caption that was not judged."""


@dataclass(frozen=True, slots=True)
class RewardBreakdown:
    """The reward of a completion, by part.

    Attributes:
        format, iou, accuracy, recall: parts in [0, 1]; None if the task has no such part, or it was not judged.
        reasons: the reason for each part that is 0 or was not judged, by name of the part. There is a small set of
            reasons, so that they can be counted.
        extra: values of user-defined rewards by name; set with `dataclasses.replace`.
    """

    format: float
    iou: float | None = None
    accuracy: float | None = None
    recall: float | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float | None:
        """The unweighted sum of the parts; None if a part was not judged: a missing reward is not a low reward.

        Format + IoU for grounding and tracking, format + accuracy for QA and quality, all three for grounded QA,
        format + recall for captioning.
        """
        if self.reasons.get("recall") == NOT_JUDGED:
            return None
        parts = (self.format, self.iou, self.accuracy, self.recall, *self.extra.values())
        return sum(part for part in parts if part is not None)


def score(sample: VideoSample, completion: str, *, thinking: bool, recall: float | None = None) -> RewardBreakdown:
    """Compute the reward of a completion, which may be any text. A part that cannot be parsed is 0, with a reason.

    Intended differences from the paper or its published code:

    - Equation 3 gives 0 for a correct format. The text of the paper and its code give 1, and so does this function.
    - An answer without an option letter is wrong. The published accuracy counts two empty answers as equal.
    - An empty list of spans scores 0. The published IoU of two empty lists is 1.
    - Numbers include their sign and exponent and have ASCII digits only; a clock time (1:05) is not a number
      (`parse_interval`).
    - If a tag is opened again inside its block, the block starts at the last opening tag.
    - A tracking answer has as many boxes as there are frames. The published prompt shows 7 frames and asks for 8 boxes.
    - White space between the numbers of ``<glue>`` is allowed.

    Args:
        sample: the sample.
        completion: text of the response.
        thinking: whether the prompt asked for ``<think>``.
        recall: event recall of a caption (`event_recall`). None means that it was not judged; the total is then None.
            A completion without a caption has recall 0 in any case.

    Raises:
        ValueError: `recall` is outside [0, 1], or is given for another task. No completion raises an error.
    """
    if recall is not None and not (isinstance(sample.target, CaptionTarget) and 0 <= recall <= 1):
        raise ValueError(f"recall must be a number in [0, 1], for captioning only; got {recall} for {sample.task}")
    fault = format_fault(sample, completion, thinking=thinking)
    parts = _task_parts(sample, completion, recall)
    values = {name: part.value for name, part in parts.items()}
    reasons = {name: part.reason for name, part in parts.items() if part.reason}
    return RewardBreakdown(
        format=0.0 if fault else 1.0,
        iou=values.get("iou"),
        accuracy=values.get("accuracy"),
        recall=values.get("recall"),
        reasons={"format": fault, **reasons} if fault else reasons,
    )


@dataclass(frozen=True, slots=True)
class _Part:
    """The value of a part of the reward, and the reason if it is 0 or was not judged."""

    value: float | None
    reason: str | None


def _task_parts(sample: VideoSample, completion: str, recall: float | None) -> dict[str, _Part]:
    """Compute all parts of the reward except the format, by name."""
    match sample.target:
        case GroundingTarget(interval):
            iou = _compute_part(lambda: temporal_iou(parse_interval(last_answer(completion)), interval), "no overlap")
            return {"iou": iou}
        case TrackingTarget(boxes):
            return {"iou": _compute_part(lambda: _tracking_iou(completion, boxes), "no overlap")}
        case GroundedChoiceTarget(choice, intervals):
            iou = _compute_part(lambda: span_union_iou(parse_spans(first_glue(completion)), intervals), "no overlap")
            return {"iou": iou, "accuracy": _compute_part(lambda: _accuracy(completion, choice), "wrong option")}
        case ChoiceTarget(choice):
            return {"accuracy": _compute_part(lambda: _accuracy(completion, choice), "wrong option")}
        case QualityTarget(label):
            return {"accuracy": _compute_part(lambda: _label_match(completion, label), "wrong label")}
        case CaptionTarget():
            return {"recall": _compute_part(lambda: _recall_of_caption(completion, recall), "no event entailed")}


def _compute_part(compute: Callable[[], float | None], zero_reason: str) -> _Part:
    """Compute a part. If the completion cannot be parsed, it is 0; `zero_reason` is the reason for any other 0."""
    try:
        value = compute()
    except UnparsableError as unparsable:
        return _Part(0.0, str(unparsable))
    if value is None:
        return _Part(None, NOT_JUDGED)
    return _Part(value, None if value > 0 else zero_reason)


def _tracking_iou(completion: str, target: tuple[Box, ...]) -> float:
    predicted = parse_boxes(last_answer(completion), len(target))
    if not any(predicted):
        raise UnparsableError("no valid box within 0..1")
    return mean_box_iou(predicted, target)


def _accuracy(completion: str, choice: str) -> float:
    return float(parse_choice(last_answer(completion)) == choice)


def _label_match(completion: str, label: str) -> float:
    return float(last_answer(completion).lower() == label.strip().lower())


def _recall_of_caption(completion: str, recall: float | None) -> float | None:
    parse_caption(completion)  # raises without a caption: such a completion scores 0, judged or not
    return recall
