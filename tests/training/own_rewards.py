"""User rewards for tests that an untrained policy sometimes gets."""

from __future__ import annotations

from megatron_vcr1.types import RewardPart, Sample


def variety(sample: Sample, completion: str) -> float:
    """Return the number of distinct characters divided by the length."""
    return len(set(completion)) / max(len(completion), 1)


def letters(sample: Sample, completion: str) -> float:
    """Return the fraction of lower-case letters."""
    return sum(letter.islower() for letter in completion) / max(len(completion), 1)


def starts_small(sample: Sample, completion: str) -> float:
    """Return 1 if the first character is a lower-case letter: mostly the same for both responses of a pair."""
    return float(completion[:1].islower())


def starts_early(sample: Sample, completion: str) -> float:
    """Return 1 if the first character is one of the first letters of the alphabet, which is rarer still."""
    return float("a" <= completion[:1] <= "g")


def raises(sample: Sample, completion: str) -> float:
    """Raise, like a user reward with a bug."""
    raise KeyError(sample.id)


def half_right(sample: Sample, completion: str) -> RewardPart:
    """Replaces the accuracy: half a reward for half of the label."""
    is_half = sample.target.label.split()[0] in completion
    return RewardPart(0.5) if is_half else RewardPart(0.0, "not even half right")
