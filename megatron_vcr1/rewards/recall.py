"""Event recall of a caption (VideoChat-R1, equation 6), computed from a judge's verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum


class Verdict(StrEnum):
    """The relation of a description to an event, as in AutoDQ (Tarsier)."""

    ENTAILMENT = "entailment"
    NEUTRAL = "neutral"
    CONTRADICTION = "contradiction"


def event_recall(verdicts: Sequence[Verdict]) -> float:
    """Compute the fraction of the reference's events that the caption entails; 1 without events, as in AutoDQ.

    Args:
        verdicts: a verdict for each event of the reference.
    """
    if not verdicts:
        return 1.0
    return sum(verdict is Verdict.ENTAILMENT for verdict in verdicts) / len(verdicts)
