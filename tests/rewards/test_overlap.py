from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vcr1.rewards.overlap import box_iou, mean_box_iou, merge, span_union_iou, temporal_iou
from megatron_vcr1.types import Box, Interval
from tests.rewards.samples import boxes

EDGES = st.floats(0, 1e5)
INTERVALS = st.tuples(EDGES, EDGES).filter(lambda e: e[0] != e[1]).map(lambda e: Interval(min(e), max(e)))
SETS = st.lists(INTERVALS, min_size=1, max_size=6)

# If all edges are whole numbers, counting grid cells gives the exact IoU.
CELLS = 40
WHOLE = st.tuples(st.integers(0, CELLS), st.integers(0, CELLS)).filter(lambda e: e[0] != e[1]).map(sorted)
WHOLE_SETS = st.lists(WHOLE, max_size=6)


def covered(spans: list[list[int]]) -> np.ndarray:
    cells = np.zeros(CELLS, dtype=bool)
    for start, end in spans:
        cells[start:end] = True
    return cells


def iou_of_cells(first: np.ndarray, second: np.ndarray) -> float:
    union = (first | second).sum()
    return (first & second).sum() / union if union else 0.0


def intervals(spans: list[list[int]], unit_s: float = 0.5) -> list[Interval]:
    return [Interval(start * unit_s, end * unit_s) for start, end in spans]


@settings(deadline=None)
@given(WHOLE, WHOLE)
def test_temporal_iou_equals_counting_cells(first: list[int], second: list[int]) -> None:
    (predicted,), (target,) = intervals([first]), intervals([second])
    assert temporal_iou(predicted, target) == pytest.approx(
        iou_of_cells(covered([first]), covered([second])), abs=1e-12
    )


@settings(deadline=None)
@given(WHOLE_SETS, WHOLE_SETS)
def test_span_union_iou_equals_counting_cells(first: list[list[int]], second: list[list[int]]) -> None:
    expected = iou_of_cells(covered(first), covered(second))
    assert span_union_iou(intervals(first), intervals(second)) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(WHOLE, WHOLE, WHOLE, WHOLE)
def test_box_iou_equals_counting_cells(ax: list[int], ay: list[int], bx: list[int], by: list[int]) -> None:
    first = np.outer(covered([ay]), covered([ax]))
    second = np.outer(covered([by]), covered([bx]))
    pair = [Box(x[0] / CELLS, y[0] / CELLS, x[1] / CELLS, y[1] / CELLS) for x, y in ((ax, ay), (bx, by))]
    assert box_iou(*pair) == pytest.approx(iou_of_cells(first, second), abs=1e-12)


@settings(deadline=None)
@given(SETS, SETS)
def test_span_ious_are_symmetric_bounded_and_1_for_equal_spans(first: list[Interval], second: list[Interval]) -> None:
    for iou, a, b in ((temporal_iou, first[0], second[0]), (span_union_iou, first, second)):
        assert 0 <= iou(a, b) <= 1
        assert iou(a, b) == iou(b, a)
        assert iou(a, a) == 1
    assert span_union_iou(first, [*first, *first]) == 1


@settings(deadline=None)
@given(INTERVALS, INTERVALS)
def test_span_union_iou_of_single_spans_equals_temporal_iou(first: Interval, second: Interval) -> None:
    assert span_union_iou([first], [second]) == pytest.approx(temporal_iou(first, second), abs=1e-9)


@settings(deadline=None)
@given(boxes, boxes)
def test_box_iou_is_symmetric_bounded_and_1_for_equal_boxes(first: Box, second: Box) -> None:
    assert 0 <= box_iou(first, second) <= 1
    assert box_iou(first, second) == box_iou(second, first)
    has_area = (first.x1 - first.x0) * (first.y1 - first.y0) > 0  # tiny sides multiply to zero
    assert box_iou(first, first) == has_area


def test_worked_examples() -> None:
    assert temporal_iou(Interval(5, 15), Interval(10, 20)) == pytest.approx(1 / 3)
    assert temporal_iou(Interval(0, 100), Interval(10, 20)) == pytest.approx(0.1)
    assert temporal_iou(Interval(0, 10), Interval(10, 20)) == 0
    assert span_union_iou([Interval(0, 4), Interval(2, 6), Interval(8, 9)], [Interval(5, 10)]) == pytest.approx(0.2)
    assert box_iou(Box(0, 0, 0.5, 0.5), Box(0.25, 0.25, 0.75, 0.75)) == pytest.approx(1 / 7)


def test_empty_sets_have_iou_0() -> None:
    assert span_union_iou([], []) == span_union_iou([], [Interval(0, 1)]) == 0


def test_extreme_sizes_neither_overflow_nor_divide_by_zero() -> None:
    endless = Interval(0, 1.7e308)
    assert temporal_iou(endless, endless) == span_union_iou([endless], [endless]) == 1
    assert span_union_iou([endless], [Interval(1, 2)]) == pytest.approx(0)
    speck = Box(0, 0, 1e-200, 1e-200)
    assert box_iou(speck, speck) == 0


def test_merged_spans_are_disjoint_and_in_order() -> None:
    spans = [Interval(8, 9), Interval(0, 4), Interval(4, 6), Interval(1, 2)]
    assert merge(spans) == [Interval(0, 6), Interval(8, 9)]


def test_a_frame_without_a_box_counts_as_zero() -> None:
    box, far = Box(0, 0, 0.5, 0.5), Box(0.5, 0.5, 1, 1)
    assert mean_box_iou([box, None, far, box], [box] * 4) == 0.5
    with pytest.raises(ValueError, match="zip"):
        mean_box_iou([box], [box, box])
