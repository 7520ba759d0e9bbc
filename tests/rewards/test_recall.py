from __future__ import annotations

from megatron_vcr1.rewards.recall import Verdict, event_recall


def test_only_entailment_counts() -> None:
    assert (
        event_recall([Verdict("entailment"), Verdict("neutral"), Verdict("contradiction"), Verdict.ENTAILMENT]) == 0.5
    )
    assert event_recall([Verdict.NEUTRAL]) == 0
    assert event_recall([]) == 1
