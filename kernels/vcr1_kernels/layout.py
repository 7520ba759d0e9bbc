"""The segments of a packed sequence, and which tokens attend to which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import NamedTuple


class QuerySpan(NamedTuple):
    """Consecutive tokens of a segment that have a query."""

    segment: int
    start: int  # first token
    end: int
    row: int  # index of the first token's query in the query tensor

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def end_row(self) -> int:
        return self.row + self.end - self.start


@dataclass(frozen=True)
class SegmentLayout:
    """Consecutive segments of a packed sequence, each attending to itself and to all of its prefix segment, if any.

    A GRPO group is a prompt with prefix -1, followed by responses whose prefix is the prompt's index. Packed text and
    vision windows are segments without prefixes. Segments may be empty. Layouts are hashable: the ops cache the tables
    that they derive from a layout.

    Attributes:
        lengths: number of tokens of each segment; their sum is the number of tokens of the sequence.
        prefixes: for each segment, the index of its prefix segment, or -1. A prefix has no prefix itself. It may be
            anywhere in the sequence.
        causal: within a segment, token i attends to tokens <= i if True, otherwise to the whole segment. A prefix is
            always attended to as a whole.
        queries: the token ranges (start, end) that have a query here, in the order of the query tensor. None: every
            token has a query, in order. Under context parallelism a rank has the queries of a part of the prefix and
            the keys of all of it. Ranges need a causal layout.

    Raises:
        ValueError: a length is negative, a prefix is out of range or has a prefix itself, or a range of queries is
            not a range of tokens.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    causal: bool = True
    queries: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.prefixes):
            raise ValueError(
                f"{len(self.lengths)} lengths but {len(self.prefixes)} prefixes; give each segment a prefix or -1"
            )
        for segment, length in enumerate(self.lengths):
            if length < 0:
                raise ValueError(f"segment {segment} has a negative length, {length}")
        for segment, prefix in enumerate(self.prefixes):
            if prefix == -1:
                continue
            if not 0 <= prefix < len(self.lengths) or prefix == segment:
                raise ValueError(f"segment {segment} names prefix {prefix}; use -1 or the index of another segment")
            if self.prefixes[prefix] != -1:
                raise ValueError(
                    f"segment {segment} names prefix {prefix}, which has a prefix itself; only one level is supported"
                )
        if self.queries is not None and not self.causal:
            raise ValueError("a layout that is not causal has a query for every token; leave out `queries`")
        for start, end in self.queries or ():
            if not 0 <= start <= end <= self.num_tokens:
                raise ValueError(f"queries of tokens {start} to {end} are not among the {self.num_tokens} tokens")

    @classmethod
    def packed(cls, lengths: Sequence[int], *, causal: bool = True) -> SegmentLayout:
        """Create a layout of independent segments: packed text (causal) or vision windows (not causal)."""
        return cls(tuple(lengths), (-1,) * len(lengths), causal)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all segments, which is the number of keys."""
        return self.starts[-1]

    @property
    def num_queries(self) -> int:
        """Number of tokens that have a query."""
        return self.num_tokens if self.queries is None else sum(end - start for start, end in self.queries)

    @cached_property
    def query_spans(self) -> tuple[QuerySpan, ...]:
        """The queries of each segment, as runs of consecutive tokens, in the order of the query tensor."""
        spans = []
        row = 0
        for start, end in ((0, self.num_tokens),) if self.queries is None else self.queries:
            for segment, (own_start, own_end) in enumerate(pairwise(self.starts)):
                first, last = max(start, own_start), min(end, own_end)
                if first < last:
                    spans.append(QuerySpan(segment, first, last, row + first - start))
            row += end - start
        return tuple(spans)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Index of the first token of each segment, followed by the number of tokens; [num_segments + 1]."""
        return tuple(accumulate(self.lengths, initial=0))

    @cached_property
    def merged(self) -> SegmentLayout:
        """An equivalent layout with fewer segments.

        A causal prefix and the segment that directly follows it form one causal sequence if no other segment uses the
        prefix. Layouts that are not causal are returned unchanged: there the prefix does not attend to its segment.
        """
        if not self.causal:
            return self
        num_users = Counter(self.prefixes)
        lengths: list[int] = []
        prefixes: list[int] = []
        merged_index: list[int] = []  # for each segment, the index of the merged segment that contains it
        for segment, (length, prefix) in enumerate(zip(self.lengths, self.prefixes, strict=True)):
            if 0 <= prefix == segment - 1 and num_users[prefix] == 1:
                lengths[-1] += length
            else:
                lengths.append(length)
                prefixes.append(prefix)
            merged_index.append(len(lengths) - 1)
        merged_prefixes = tuple(-1 if prefix < 0 else merged_index[prefix] for prefix in prefixes)
        return SegmentLayout(tuple(lengths), merged_prefixes, queries=self.queries)
