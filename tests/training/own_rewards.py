"""Rewards of the user's own, for policies that have not learned to answer anything."""

from __future__ import annotations

from megatron_vcr1.types import VideoSample


def variety(sample: VideoSample, completion: str) -> float:
    """Different characters among those written."""
    return len(set(completion)) / max(len(completion), 1)


def letters(sample: VideoSample, completion: str) -> float:
    """The share of small letters."""
    return sum(letter.islower() for letter in completion) / max(len(completion), 1)


def starts_small(sample: VideoSample, completion: str) -> float:
    """Whether the first character is a small letter: mostly the same for both responses of a pair."""
    return float(completion[:1].islower())


def starts_early(sample: VideoSample, completion: str) -> float:
    """The same with the first few letters of the alphabet, still rarer."""
    return float("a" <= completion[:1] <= "g")


def raises(sample: VideoSample, completion: str) -> float:
    """A mistake of the user's."""
    raise KeyError(sample.id)
