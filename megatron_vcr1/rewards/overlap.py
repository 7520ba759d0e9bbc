"""Intersection over union (IoU; VideoChat-R1, equation 4) of spans and of boxes: symmetric, and in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from megatron_vcr1.types import Box, Interval


def temporal_iou(predicted: Interval, target: Interval) -> float:
    """Compute the IoU of two spans."""
    overlap_s = min(predicted.end_s, target.end_s) - max(predicted.start_s, target.start_s)
    if overlap_s <= 0:
        return 0.0
    # The union of two overlapping spans is the span from the first start to the last end.
    return overlap_s / (max(predicted.end_s, target.end_s) - min(predicted.start_s, target.start_s))


def span_union_iou(predicted: Sequence[Interval], target: Sequence[Interval]) -> float:
    """Compute the IoU of the time that two sets of spans cover; the spans of a set may overlap.

    The result is 0 if either set is empty. The published reward is 1 if both are empty.
    """
    union_s = _total_s(merge([*predicted, *target]))
    if union_s == 0:
        return 0.0
    # Due to rounding, the sum of many short intersections may exceed the union.
    return min(_total_s(_intersection(merge(predicted), merge(target))) / union_s, 1.0)


def merge(spans: Iterable[Interval]) -> list[Interval]:
    """Merge overlapping and adjacent spans; return disjoint spans in order of time."""
    merged: list[Interval] = []
    for span in sorted(spans, key=lambda span: span.start_s):
        if merged and span.start_s <= merged[-1].end_s:
            merged[-1] = Interval(merged[-1].start_s, max(merged[-1].end_s, span.end_s))
        else:
            merged.append(span)
    return merged


def box_iou(predicted: Box, target: Box) -> float:
    """Compute the IoU of two boxes; 0 if both are so small that their area is 0 in floating point."""
    return uncut_box_iou((predicted.x0, predicted.y0, predicted.x1, predicted.y1), target)


def uncut_box_iou(predicted: Sequence[float], target: Box) -> float:
    """Compute the IoU of a box that may extend beyond the frame, as published evaluations do.

    Args:
        predicted: x0, y0, x1, y1; any numbers. An inverted box has an IoU of 0.
        target: the true box.
    """
    x0, y0, x1, y1 = predicted
    width, height = min(x1, target.x1) - max(x0, target.x0), min(y1, target.y1) - max(y0, target.y0)
    if not (width > 0 and height > 0):
        return 0.0
    intersection = width * height
    union = (x1 - x0) * (y1 - y0) + (target.x1 - target.x0) * (target.y1 - target.y0) - intersection
    return intersection / union if union > 0 else 0.0


def mean_box_iou(predicted: Sequence[Box | None], target: Sequence[Box]) -> float:
    """Compute the mean IoU over the frames of a video.

    Args:
        predicted: box of each frame; None for an invalid box, which counts as IoU 0.
        target: box of each frame.

    Raises:
        ValueError: the numbers of frames differ.
    """
    ious = [box_iou(box, target_box) if box else 0.0 for box, target_box in zip(predicted, target, strict=True)]
    return math.fsum(ious) / len(ious)


def mean_uncut_box_iou(predicted: Sequence[Sequence[float]], target: Sequence[Box]) -> float:
    """Compute the mean over the frames of a video of `uncut_box_iou`."""
    ious = [uncut_box_iou(row, box) for row, box in zip(predicted, target, strict=True)]
    return math.fsum(ious) / len(ious)


def _total_s(spans: Iterable[Interval]) -> float:
    return math.fsum(span.duration_s for span in spans)


def _intersection(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """Intersect two lists of disjoint spans, each in order of time; the result is also disjoint and in order."""
    common, i, j = [], 0, 0
    while i < len(first) and j < len(second):
        start_s = max(first[i].start_s, second[j].start_s)
        end_s = min(first[i].end_s, second[j].end_s)
        if start_s < end_s:
            common.append(Interval(start_s, end_s))
        if first[i].end_s <= second[j].end_s:
            i += 1
        else:
            j += 1
    return common
