"""Intersection over union (VideoChat-R1, equation 4) of spans and of boxes: symmetric, and in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from megatron_vcr1.types import Box, Interval


def temporal_iou(predicted: Interval, target: Interval) -> float:
    """IoU of two spans."""
    overlap_s = min(predicted.end_s, target.end_s) - max(predicted.start_s, target.start_s)
    if overlap_s <= 0:
        return 0.0
    # Spans that overlap have their hull as union.
    return overlap_s / (max(predicted.end_s, target.end_s) - min(predicted.start_s, target.start_s))


def span_union_iou(predicted: Sequence[Interval], target: Sequence[Interval]) -> float:
    """IoU of what two sets of spans cover; spans of a set may overlap each other.

    0 if either set is empty. The published reward gives 1 if both are.
    """
    union_s = _total_s(merge([*predicted, *target]))
    if union_s == 0:
        return 0.0
    # Many small pieces may round to more than the whole that they are of.
    return min(_total_s(_intersection(merge(predicted), merge(target))) / union_s, 1.0)


def merge(spans: Iterable[Interval]) -> list[Interval]:
    """The same time as disjoint spans in order; spans that touch become one."""
    merged: list[Interval] = []
    for span in sorted(spans, key=lambda span: span.start_s):
        if merged and span.start_s <= merged[-1].end_s:
            merged[-1] = Interval(merged[-1].start_s, max(merged[-1].end_s, span.end_s))
        else:
            merged.append(span)
    return merged


def box_iou(predicted: Box, target: Box) -> float:
    """IoU of two boxes; 0 if both are too small to have an area in floating point."""
    width = min(predicted.x1, target.x1) - max(predicted.x0, target.x0)
    height = min(predicted.y1, target.y1) - max(predicted.y0, target.y0)
    intersection = max(width, 0.0) * max(height, 0.0)
    union = _area(predicted) + _area(target) - intersection
    return intersection / union if union > 0 else 0.0


def mean_box_iou(predicted: Sequence[Box | None], target: Sequence[Box]) -> float:
    """Mean over the frames of the IoU; a frame without a valid predicted box counts as 0.

    Raises:
        ValueError: the numbers of frames differ.
    """
    ious = [box_iou(box, truth) if box else 0.0 for box, truth in zip(predicted, target, strict=True)]
    return math.fsum(ious) / len(ious)


def _total_s(spans: Iterable[Interval]) -> float:
    return math.fsum(span.duration_s for span in spans)


def _intersection(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """What two lists of disjoint spans in order have in common, the same way."""
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


def _area(box: Box) -> float:
    return (box.x1 - box.x0) * (box.y1 - box.y0)
