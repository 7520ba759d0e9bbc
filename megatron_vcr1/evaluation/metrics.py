"""The metrics of one output on a benchmark: pure functions of a sample and an output, like the rewards.

Where the paper and the authors of a dataset define a metric differently, both are computed under different names. All
metrics are in [0, 1] and higher is better. An unreadable answer scores 0, with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

from megatron_vcr1.evaluation.answer_parsing import read_answer, read_choice
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
class SampleMetrics:
    """The metrics of one output.

    Attributes:
        values: value by metric name; empty if a judge could not judge the output.
        reasons: for each part of the answer that scored 0 (iou, accuracy, recall), the reason.
    """

    values: Mapping[str, float]
    reasons: Mapping[str, str] = field(default_factory=dict)


def grounding(sample: VideoSample, output: str) -> SampleMetrics:
    """Compute mIoU and R@t, which is 1 if the IoU is at least t (Charades-STA, ActivityNet)."""
    target = cast(GroundingTarget, sample.target).interval
    iou, reasons = _parse("iou", 0.0, lambda: temporal_iou(parse_interval(read_answer(output)), target))
    values = {"mIoU": iou, **_at_least("R", iou, (0.3, 0.5, 0.7))}
    return SampleMetrics(values, reasons or _if_zero("iou", iou, "no overlap"))


def tracking(sample: VideoSample, output: str) -> SampleMetrics:
    """Compute the metrics of GOT-10k in two conventions.

    The paper's: ``overlap`` is the mean IoU of all boxes, and R@t is 1 if it is at least t. A box that extends beyond
    the frame scores 0. The toolkit's: ``AO`` and ``SR@t`` leave out the first box, which the prompt states. SR is the
    fraction of frames with an IoU above t, and boxes are cut at the frame.
    """
    target = cast(TrackingTarget, sample.target).boxes
    overlap, reasons = _parse("iou", 0.0, lambda: mean_box_iou(parse_boxes(read_answer(output), len(target)), target))
    ious, _ = _parse("iou", [0.0] * len(target), lambda: toolkit_ious(read_answer(output), target))
    later = ious[1:]
    values = {
        "overlap": overlap,
        **_at_least("R", overlap, (0.5, 0.7)),
        "AO": math.fsum(later) / len(later),
        **{f"SR@{threshold}": sum(iou > threshold for iou in later) / len(later) for threshold in (0.5, 0.75)},
    }
    return SampleMetrics(values, reasons or _if_zero("iou", overlap, "no overlap"))


def grounded_choice(sample: VideoSample, output: str) -> SampleMetrics:
    """Compute the metrics of NExT-GQA in two conventions.

    The paper's: ``mIoU`` of the merged spans, and ``accuracy``. The authors': IoU and IoP (the fraction of the
    predicted span that is correct) of a single predicted span with the annotated span that it fits best, and Acc@GQA,
    which is 1 for the correct option with an IoP of at least 0.5. If several spans are predicted, the longest counts as
    the single span, the first of equally long ones. A predicted span without length does not count; the authors give
    it an IoP of 1.
    """
    target = cast(GroundedChoiceTarget, sample.target)
    no_spans: tuple[Interval, ...] = ()
    spans, iou_reasons = _parse("iou", no_spans, lambda: parse_spans(first_glue(output)))
    accuracy, accuracy_reasons = _accuracy(output, target.choice)
    union_iou = span_union_iou(spans, target.intervals)
    iou, iop = single_span_scores(spans, target.intervals)
    values = {
        "mIoU": union_iou,
        "accuracy": accuracy,
        "Acc@GQA": accuracy * (iop >= 0.5),
        "mIoP": iop,
        **_at_least("IoP", iop, (0.3, 0.5)),
        "mIoU (single span)": iou,
        **_at_least("IoU", iou, (0.3, 0.5)),
    }
    reasons = {**(iou_reasons or _if_zero("iou", union_iou, "no overlap")), **accuracy_reasons}
    return SampleMetrics(values, reasons)


def choice(sample: VideoSample, output: str) -> SampleMetrics:
    """Compute the accuracy of a multiple-choice answer."""
    accuracy, reasons = _accuracy(output, cast(ChoiceTarget, sample.target).choice)
    return SampleMetrics({"accuracy": accuracy}, reasons)


def quality(sample: VideoSample, output: str) -> SampleMetrics:
    """Compute the accuracy of a VidTAB label, ignoring case."""
    label = cast(QualityTarget, sample.target).label.strip().lower()
    accuracy, reasons = _parse("accuracy", 0.0, lambda: float(read_answer(output).lower() == label))
    return SampleMetrics({"accuracy": accuracy}, reasons or _if_zero("accuracy", accuracy, "wrong label"))


def caption(recall: float, precision: float, reasons: Mapping[str, str]) -> SampleMetrics:
    """Return AutoDQ's recall and precision of a caption. Their F1 is computed from the means, in `summary`."""
    values = {"recall": recall, "precision": precision}
    return SampleMetrics(values, reasons or _if_zero("recall", recall, "no event entailed"))


def single_span_scores(predicted: Sequence[Interval], target: Sequence[Interval]) -> tuple[float, float]:
    """Return NExT-GQA's IoU and IoP of the longest predicted span, each the best over the annotated spans.

    Without a predicted span both are 0.
    """
    if not predicted:
        return 0.0, 0.0
    span = max(merge(predicted), key=lambda merged: merged.duration_s)
    iou = max(temporal_iou(span, truth) for truth in target)
    covered_s = max(min(span.end_s, truth.end_s) - max(span.start_s, truth.start_s) for truth in target)
    return iou, min(max(covered_s, 0.0) / span.duration_s, 1.0)


def toolkit_ious(answer: str, target: Sequence[Box]) -> list[float]:
    """Return the IoU of each frame as the GOT-10k toolkit computes it, from left, top, width and height.

    Boxes are cut at the frame. A box that begins outside of the frame is moved inside with its size, instead of being
    cut at both ends. A box with a number that is not finite scores 0.

    Raises:
        UnparsableError: the answer is not a list of as many boxes as `target`.
    """
    return [_toolkit_iou(row, box) for row, box in zip(parse_box_rows(answer, len(target)), target, strict=True)]


def _toolkit_iou(row: tuple[float, ...], target: Box) -> float:
    if not all(map(math.isfinite, row)):
        return 0.0
    x0, y0 = _clip(row[0], 1.0), _clip(row[1], 1.0)
    x1, y1 = x0 + _clip(row[2] - row[0], 1 - x0), y0 + _clip(row[3] - row[1], 1 - y0)
    width = max(min(x1, target.x1) - max(x0, target.x0), 0.0)
    height = max(min(y1, target.y1) - max(y0, target.y0), 0.0)
    union = (x1 - x0) * (y1 - y0) + (target.x1 - target.x0) * (target.y1 - target.y0) - width * height
    return min(width * height / union, 1.0) if union > 0 else 0.0


def _clip(value: float, high: float) -> float:
    """Clip to [0, high]."""
    return min(max(value, 0.0), high)


def _accuracy(output: str, target: str) -> tuple[float, Mapping[str, str]]:
    accuracy, reasons = _parse("accuracy", 0.0, lambda: float(read_choice(output) == target))
    return accuracy, reasons or _if_zero("accuracy", accuracy, "wrong option")


def _parse(part: str, default: T, compute: Callable[[], T]) -> tuple[T, Mapping[str, str]]:
    """Return the computed value; for an unreadable answer, the default and the reason."""
    try:
        return compute(), {}
    except UnparsableError as unparsable:
        return default, {part: str(unparsable)}


def _if_zero(part: str, value: float, reason: str) -> Mapping[str, str]:
    return {} if value > 0 else {part: reason}


def _at_least(name: str, value: float, thresholds: Sequence[float]) -> dict[str, float]:
    return {f"{name}@{threshold}": float(value >= threshold) for threshold in thresholds}
