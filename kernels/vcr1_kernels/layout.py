"""The segments of a packed sequence, and which tokens attend to which."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate


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

    Raises:
        ValueError: a length is negative, or a prefix is out of range or has a prefix itself.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    causal: bool = True

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

    @classmethod
    def packed(cls, lengths: Sequence[int], *, causal: bool = True) -> SegmentLayout:
        """Create a layout of independent segments: packed text (causal) or vision windows (not causal)."""
        return cls(tuple(lengths), (-1,) * len(lengths), causal)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all segments."""
        return self.starts[-1]

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
        return SegmentLayout(tuple(lengths), tuple(-1 if prefix < 0 else merged_index[prefix] for prefix in prefixes))
