"""How a packed sequence is divided into segments, and which of them see each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate


@dataclass(frozen=True)
class SegmentLayout:
    """Segments one behind the other, each attending to itself and, if it has one, to all of its prefix segment.

    A GRPO group is a prompt with prefix -1 followed by responses whose prefix is the prompt's index; packed text and
    vision windows are segments without prefixes. Segments may be empty.

    Attributes:
        lengths: rows of each segment; their sum is the number of tokens.
        prefixes: for each segment the index of the segment that precedes it logically, or -1; a prefix itself has none.
        causal: within a segment, row i sees rows <= i; otherwise the whole segment. A prefix is always seen whole.

    Raises:
        ValueError: a negative length, or a prefix that is out of range or has a prefix itself.
    """

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    causal: bool = True

    def __post_init__(self) -> None:
        if len(self.lengths) != len(self.prefixes):
            raise ValueError(
                f"{len(self.lengths)} lengths but {len(self.prefixes)} prefixes; give one prefix (or -1) a segment"
            )
        if any(length < 0 for length in self.lengths):
            raise ValueError(
                f"segment {min(range(len(self.lengths)), key=self.lengths.__getitem__)} has a negative length"
            )
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
        """Independent segments: packed text (causal) or vision windows (not causal)."""
        return cls(tuple(lengths), (-1,) * len(lengths), causal)

    @property
    def num_tokens(self) -> int:
        return self.starts[-1]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of each segment, and behind them the number of tokens; [num_segments + 1]."""
        return tuple(accumulate(self.lengths, initial=0))

    @cached_property
    def merged(self) -> SegmentLayout:
        """The same attention in fewer segments: a causal prefix and the only segment behind it are one sequence."""
        if not self.causal:
            return self
        num_users = Counter(self.prefixes)
        lengths: list[int] = []
        prefixes: list[int] = []
        places: list[int] = []  # of each segment among the merged
        for segment, (length, prefix) in enumerate(zip(self.lengths, self.prefixes, strict=True)):
            if 0 <= prefix == segment - 1 and num_users[prefix] == 1:
                lengths[-1] += length
            else:
                lengths.append(length)
                prefixes.append(prefix)
            places.append(len(lengths) - 1)
        return SegmentLayout(tuple(lengths), tuple(-1 if prefix < 0 else places[prefix] for prefix in prefixes))
