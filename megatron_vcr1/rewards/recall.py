"""Event recall of a caption (VideoChat-R1, equation 6), from what a judge found."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum


class Verdict(StrEnum):
    """How a description bears on one event, as in AutoDQ (Tarsier)."""

    ENTAILMENT = "entailment"
    NEUTRAL = "neutral"
    CONTRADICTION = "contradiction"


def event_recall(verdicts: Sequence[Verdict]) -> float:
    """The share of the reference's events that the caption entails; 1 if the reference has no event, as in AutoDQ.

    Args:
        verdicts: one for each event of the reference.
    """
    if not verdicts:
        return 1.0
    return sum(verdict is Verdict.ENTAILMENT for verdict in verdicts) / len(verdicts)
