"""Event recall of a caption (VideoChat-R1, equation 6), computed from the verdicts of `megatron_vcr1.judge`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum


class Verdict(StrEnum):
    """The relation of a description to an event, as in AutoDQ (Tarsier)."""

    ENTAILMENT = "entailment"
    NEUTRAL = "neutral"
    CONTRADICTION = "contradiction"


def event_recall(verdicts: Sequence[Verdict]) -> float:
    """Compute the fraction of events that are entailed; 1 if there are no events, as in AutoDQ.

    Args:
        verdicts: verdict on each event. For recall, these are the reference's events, judged against the caption.
    """
    if not verdicts:
        return 1.0
    return sum(verdict is Verdict.ENTAILMENT for verdict in verdicts) / len(verdicts)
