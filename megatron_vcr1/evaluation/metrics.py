"""What one output is worth on a benchmark: pure functions of a sample and an output, like the rewards.

Where the paper and a dataset's authors count differently, both figures are there under different names. All are in
[0, 1], more is better, and what cannot be read is 0 with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

from megatron_vcr1.evaluation.answers import read_answer, read_choice
from megatron_vcr1.rewards.overlap import mean_box_iou, merge, span_union_iou, temporal_iou
from megatron_vcr1.rewards.parsing import (
    UnparsableError,
    first_glue,
    parse_box_rows,
    parse_boxes,
    parse_interval,
    parse_spans,
)
from megatron_vcr1.types import (
    Box,
    ChoiceTarget,
    GroundedChoiceTarget,
    GroundingTarget,
    Interval,
    QualityTarget,
    TrackingTarget,
    VideoSample,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Measured:
    """One output's figures.

    Attributes:
        values: by the metric's name; empty if a judge could not judge.
        reasons: why a part of the answer is worth nothing, by the part: iou, accuracy, recall.
    """

    values: Mapping[str, float]
    reasons: Mapping[str, str] = field(default_factory=dict)


def grounding(sample: VideoSample, output: str) -> Measured:
    """mIoU, and R@t: whether the IoU is at least t (Charades-STA, ActivityNet)."""
    target = cast(GroundingTarget, sample.target).interval
    iou, reasons = _read("iou", 0.0, lambda: temporal_iou(parse_interval(read_answer(output)), target))
    return Measured({"mIoU": iou, **_shares("R", iou, (0.3, 0.5, 0.7))}, reasons or _if_zero("iou", iou, "no overlap"))


def tracking(sample: VideoSample, output: str) -> Measured:
    """GoT-10k in two conventions.

    The paper's: ``overlap`` over all boxes, and R@t: whether a video's overlap is at least t; a box beyond the frame is
    worth 0. The toolkit's: ``AO`` and ``SR@t`` without the first box, which the prompt gives away; SR counts frames
    with an IoU above t, and boxes are cut at the frame.
    """
    target = cast(TrackingTarget, sample.target).boxes
    overlap, reasons = _read("iou", 0.0, lambda: mean_box_iou(parse_boxes(read_answer(output), len(target)), target))
    ious, _ = _read("iou", [0.0] * len(target), lambda: toolkit_ious(read_answer(output), target))
    later = ious[1:]
    values = {
        "overlap": overlap,
        **_shares("R", overlap, (0.5, 0.7)),
        "AO": math.fsum(later) / len(later),
        **{f"SR@{threshold}": sum(iou > threshold for iou in later) / len(later) for threshold in (0.5, 0.75)},
    }
    return Measured(values, reasons or _if_zero("iou", overlap, "no overlap"))


def grounded_choice(sample: VideoSample, output: str) -> Measured:
    """NExT-GQA in two conventions.

    The paper's: ``mIoU`` of the merged spans, ``accuracy``. The authors': IoU and IoP (the share of the predicted span
    that is right) of a single predicted span with the annotated span that it fits best, and Acc@GQA: the right option
    with an IoP of at least 0.5. Where several spans are predicted, the longest is the single one, the first of equals.
    A predicted span of no length is none; the authors give it an IoP of 1.
    """
    target = cast(GroundedChoiceTarget, sample.target)
    no_spans: tuple[Interval, ...] = ()
    spans, iou_reasons = _read("iou", no_spans, lambda: parse_spans(first_glue(output)))
    accuracy, accuracy_reasons = _accuracy(output, target.choice)
    union_iou = span_union_iou(spans, target.intervals)
    iou, iop = single_span_scores(spans, target.intervals)
    values = {
        "mIoU": union_iou,
        "accuracy": accuracy,
        "Acc@GQA": accuracy * (iop >= 0.5),
        "mIoP": iop,
        **_shares("IoP", iop, (0.3, 0.5)),
        "mIoU (single span)": iou,
        **_shares("IoU", iou, (0.3, 0.5)),
    }
    return Measured(values, {**(iou_reasons or _if_zero("iou", union_iou, "no overlap")), **accuracy_reasons})


def choice(sample: VideoSample, output: str) -> Measured:
    """Multiple choice: accuracy."""
    accuracy, reasons = _accuracy(output, cast(ChoiceTarget, sample.target).choice)
    return Measured({"accuracy": accuracy}, reasons)


def quality(sample: VideoSample, output: str) -> Measured:
    """VidTAB: accuracy of the label, whatever its case."""
    label = cast(QualityTarget, sample.target).label.strip().lower()
    accuracy, reasons = _read("accuracy", 0.0, lambda: float(read_answer(output).lower() == label))
    return Measured({"accuracy": accuracy}, reasons or _if_zero("accuracy", accuracy, "wrong label"))


def caption(recall: float, precision: float, reasons: Mapping[str, str]) -> Measured:
    """AutoDQ: recall and precision; their F1 is of the means (`summary`)."""
    return Measured(
        {"recall": recall, "precision": precision}, reasons or _if_zero("recall", recall, "no event entailed")
    )


def single_span_scores(predicted: Sequence[Interval], target: Sequence[Interval]) -> tuple[float, float]:
    """NExT-GQA's IoU and IoP, each the best over the annotated spans, of the longest predicted span; 0 without one."""
    if not predicted:
        return 0.0, 0.0
    span = max(merge(predicted), key=lambda one: one.duration_s)
    iou = max(temporal_iou(span, truth) for truth in target)
    covered_s = max(min(span.end_s, truth.end_s) - max(span.start_s, truth.start_s) for truth in target)
    return iou, min(max(covered_s, 0.0) / span.duration_s, 1.0)


def toolkit_ious(answer: str, target: Sequence[Box]) -> list[float]:
    """IoU of each frame as the GOT-10k toolkit takes it, from left, top, width and height cut at the frame.

    A box that begins outside is moved in as it is, not cut at both ends; one with a number that is not finite is none.

    Raises:
        UnparsableError: the answer is no list of as many boxes.
    """
    return [_toolkit_iou(row, box) for row, box in zip(parse_box_rows(answer, len(target)), target, strict=True)]


def _toolkit_iou(row: tuple[float, ...], target: Box) -> float:
    if not all(map(math.isfinite, row)):
        return 0.0
    x0, y0 = _clipped(row[0], 1.0), _clipped(row[1], 1.0)
    x1, y1 = x0 + _clipped(row[2] - row[0], 1 - x0), y0 + _clipped(row[3] - row[1], 1 - y0)
    width = max(min(x1, target.x1) - max(x0, target.x0), 0.0)
    height = max(min(y1, target.y1) - max(y0, target.y0), 0.0)
    union = (x1 - x0) * (y1 - y0) + (target.x1 - target.x0) * (target.y1 - target.y0) - width * height
    return min(width * height / union, 1.0) if union > 0 else 0.0


def _clipped(value: float, most: float) -> float:
    return min(max(value, 0.0), most)


def _accuracy(output: str, truth: str) -> tuple[float, Mapping[str, str]]:
    accuracy, reasons = _read("accuracy", 0.0, lambda: float(read_choice(output) == truth))
    return accuracy, reasons or _if_zero("accuracy", accuracy, "wrong option")


def _read(part: str, otherwise: T, measure: Callable[[], T]) -> tuple[T, Mapping[str, str]]:
    """What can be measured, or what an unreadable answer is worth, with the reason."""
    try:
        return measure(), {}
    except UnparsableError as unparsable:
        return otherwise, {part: str(unparsable)}


def _if_zero(part: str, value: float, reason: str) -> Mapping[str, str]:
    return {} if value > 0 else {part: reason}


def _shares(name: str, value: float, thresholds: Sequence[float]) -> dict[str, float]:
    return {f"{name}@{threshold}": float(value >= threshold) for threshold in thresholds}
