from __future__ import annotations

import pytest

from megatron_vcr1.rewards import score
from megatron_vcr1.rewards.scoring import NOT_JUDGED
from tests.rewards.samples import sample


def test_a_caption_without_a_judge_has_no_total() -> None:
    caption = sample("captioning")
    unjudged = score(caption, "<answer>A dog.</answer>", thinking=False)
    assert (unjudged.format, unjudged.recall, unjudged.total) == (1, None, None)
    assert unjudged.reasons == {"recall": NOT_JUDGED}
    assert score(caption, "<answer>A dog.</answer>", thinking=False, judged=0.25).total == 1.25
    assert score(caption, "<answer>A dog.</answer>", thinking=False, judged=0).reasons == {
        "recall": "no event entailed"
    }


@pytest.mark.parametrize("completion, reason", [("A dog.", "no <answer>"), ("<answer> </answer>", "empty caption")])
def test_a_missing_caption_scores_0_without_a_judge(completion: str, reason: str) -> None:
    for recall in (None, 1.0):
        breakdown = score(sample("captioning"), completion, thinking=False, judged=recall)
        assert breakdown.recall == 0
        assert breakdown.reasons["recall"] == reason
        assert breakdown.total == breakdown.format
