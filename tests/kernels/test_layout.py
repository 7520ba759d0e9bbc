from __future__ import annotations

import pytest
from vcr1_kernels import SegmentLayout


def test_rows_of_a_group() -> None:
    layout = SegmentLayout((5, 2, 0, 3), (-1, 0, 0, 0))
    assert layout.starts == (0, 5, 7, 7, 10)
    assert layout.num_tokens == 10


def test_packed_segments_have_no_prefix() -> None:
    layout = SegmentLayout.packed([4, 4], causal=False)
    assert layout == SegmentLayout((4, 4), (-1, -1), causal=False)


def test_no_segments() -> None:
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
def test_impossible_layouts(lengths: tuple[int, ...], prefixes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentLayout(lengths, prefixes)
