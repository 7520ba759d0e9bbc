"""The tables of the attention kernels: every pair of a query and a visible key is computed exactly once."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from vcr1_kernels import SegmentLayout
from vcr1_kernels.reference import attention_mask

pytest.importorskip("triton")
from vcr1_kernels.triton_ops.attention import _joined, _key_blocks, _query_blocks, _Tiles

CPU = torch.device("cpu")
LAYOUTS = {
    "group": SegmentLayout((70, 33, 5, 18), (-1, 0, 0, 0)),
    "two-groups-and-an-empty-response": SegmentLayout((9, 4, 0, 66, 3), (-1, 0, 0, -1, 3)),
    "prefix-after-and-between-its-segments": SegmentLayout((5, 7, 6, 3), (1, -1, 1, -1)),
    "packed": SegmentLayout.packed((3, 3, 70, 1, 0)),
    "windows": SegmentLayout.packed((16, 16, 8, 16, 5), causal=False),
    "prefix-not-causal": SegmentLayout((20, 9, 9), (-1, 0, 0), causal=False),
    "context-rank": SegmentLayout((70, 33, 5), (-1, 0, 0), queries=((3, 18), (50, 70), (70, 108))),
    "context-rank-two-groups": SegmentLayout(
        (40, 9, 30, 9, 3), (-1, 0, -1, 2, -1), queries=((10, 20), (20, 30), (57, 64), (64, 71), (40, 49), (79, 91))
    ),
}
with_every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def _assert_longest_first(lengths: list[int]) -> None:
    assert lengths == sorted(lengths, reverse=True)


@with_every_layout
def test_query_blocks_cover_the_mask(layout: SegmentLayout) -> None:
    block_queries = 16
    count = torch.zeros(layout.num_queries, layout.num_tokens, dtype=torch.int64)
    num_keys = []
    for start, end, own_start, prefix_start, prefix_end, row in _query_blocks(layout, block_queries, CPU).tolist():
        queries = slice(row, row + min(block_queries, end - start))
        count[queries, prefix_start:prefix_end] += 1
        own = torch.ones(queries.stop - row, end - own_start, dtype=torch.int64)
        count[queries, own_start:end] += own.tril(start - own_start) if layout.causal else own
        num_keys.append(prefix_end - prefix_start + (start if layout.causal else end) - own_start)
    assert torch.equal(count, attention_mask(layout).long())
    _assert_longest_first(num_keys)


@with_every_layout
@pytest.mark.parametrize(("resident", "streamed"), [(16, 8), (16, 16), (16, 32)])
@pytest.mark.parametrize("num_splits", [1, 2, 3])
def test_key_blocks_cover_the_mask(layout: SegmentLayout, resident: int, streamed: int, num_splits: int) -> None:
    blocks, ranges = _key_blocks(layout, _Tiles(resident, streamed, num_warps=1, num_stages=1), num_splits, CPU)
    count = torch.zeros(layout.num_queries, layout.num_tokens, dtype=torch.int64)
    num_queries = []
    num_rows = Counter(tuple(block[:1] + block[-1:]) for block in blocks.tolist())
    assert set(num_rows.values()) <= {1} and len(num_rows) == num_splits * len({start for start, _ in num_rows})
    for start, end, first_masked, first_whole, end_range, _ in blocks.tolist():
        keys = torch.arange(start, min(start + resident, end))
        masked: list[list[int]] = ranges[first_masked:first_whole].tolist()
        for first, last, shift in masked:
            rows = torch.arange(first, last)
            count[first:last, start : start + len(keys)] += rows[:, None] + shift >= keys
        whole: list[list[int]] = ranges[first_whole:end_range].tolist()
        for first, last, _ in whole:
            count[first:last, start : start + len(keys)] += 1
        num_queries.append(sum(last - first for first, last, _ in (*masked, *whole)))
    assert torch.equal(count, attention_mask(layout).long())
    _assert_longest_first(num_queries)


def test_tables_without_tokens_have_no_rows() -> None:
    empty: SegmentLayout = SegmentLayout((0,), (-1,))
    tables: tuple[Tensor, ...] = (_query_blocks(empty, 16, CPU), *_key_blocks(empty, _Tiles(16, 16, 1, 1), 2, CPU))
    assert [tuple(table.shape) for table in tables] == [(0, 6), (0, 6), (0, 3)]


def test_adjacent_ranges_are_joined_and_empty_ones_dropped() -> None:
    assert _joined([(4, 6), (0, 2), (2, 3), (8, 8), (6, 7)]) == [(0, 3), (4, 7)]
