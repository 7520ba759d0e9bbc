from __future__ import annotations

import pytest
import torch
from vcr1_kernels import SegmentLayout
from vcr1_kernels.reference import attention_mask


def test_starts_of_a_group() -> None:
    layout = SegmentLayout((5, 2, 0, 3), (-1, 0, 0, 0))
    assert layout.starts == (0, 5, 7, 7, 10)
    assert layout.num_tokens == 10


def test_packed_segments_have_no_prefix() -> None:
    layout = SegmentLayout.packed([4, 4], causal=False)
    assert layout == SegmentLayout((4, 4), (-1, -1), causal=False)


@pytest.mark.parametrize(
    ("lengths", "prefixes", "merged_lengths", "merged_prefixes"),
    [
        ((5, 3, 2, 1), (-1, 0, -1, 2), (8, 3), (-1, -1)),  # one response each
        ((5, 3, 7, 2, 2), (-1, 0, -1, 2, 2), (8, 7, 2, 2), (-1, -1, 1, 1)),
        ((3, 5, 4, 2), (3, -1, 1, -1), (3, 9, 2), (2, -1, -1)),  # a prefix after its segment
    ],
)
def test_a_prefix_and_its_only_segment_are_merged_if_adjacent(
    lengths: tuple[int, ...],
    prefixes: tuple[int, ...],
    merged_lengths: tuple[int, ...],
    merged_prefixes: tuple[int, ...],
) -> None:
    layout = SegmentLayout(lengths, prefixes)
    merged = SegmentLayout(merged_lengths, merged_prefixes)
    assert layout.merged == merged
    assert torch.equal(attention_mask(layout), attention_mask(merged))


def test_queries_of_some_tokens() -> None:
    layout = SegmentLayout((5, 2, 3), (-1, 0, -1), queries=((8, 10), (1, 7)))
    assert (layout.num_tokens, layout.num_queries) == (10, 8)
    assert layout.query_spans == ((2, 8, 10, 0), (0, 1, 5, 2), (1, 5, 7, 6))
    assert torch.equal(
        attention_mask(layout), attention_mask(SegmentLayout((5, 2, 3), (-1, 0, -1)))[[8, 9, *range(1, 7)]]
    )


def test_merging_keeps_the_queries() -> None:
    layout = SegmentLayout((5, 2), (-1, 0), queries=((3, 7),))
    assert layout.merged == SegmentLayout((7,), (-1,), queries=((3, 7),))
    assert torch.equal(attention_mask(layout.merged), attention_mask(layout))


@pytest.mark.parametrize("queries", [((0, 6),), ((-1, 2),), ((3, 2),)])
def test_queries_must_be_ranges_of_tokens(queries: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="are not among the 5 tokens"):
        SegmentLayout((5,), (-1,), queries=queries)


def test_noncausal_layouts_have_every_query() -> None:
    with pytest.raises(ValueError, match="has a query for every token"):
        SegmentLayout((5,), (-1,), causal=False, queries=((0, 5),))


def test_noncausal_layouts_are_not_merged() -> None:
    layout = SegmentLayout((5, 3), (-1, 0), causal=False)
    assert layout.merged == layout


def test_empty_layout_has_no_tokens() -> None:
    assert SegmentLayout((), ()).num_tokens == 0


@pytest.mark.parametrize(
    ("lengths", "prefixes", "message"),
    [
        ((1, 2), (-1,), "2 lengths but 1 prefixes"),
        ((1, -2), (-1, -1), "segment 1 has a negative length"),
        ((1, 2), (-1, 2), "segment 1 names prefix 2"),
        ((1, 2), (-1, 1), "segment 1 names prefix 1"),
        ((1, 2), (-1, -2), "segment 1 names prefix -2"),
        ((1, 2, 3), (-1, 0, 1), "which has a prefix itself"),
    ],
)
def test_invalid_layout_raises(lengths: tuple[int, ...], prefixes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentLayout(lengths, prefixes)
