from __future__ import annotations

import pytest

from megatron_vcr1.rewards import score
from megatron_vcr1.tasks.temporal_grounding import TASK
from tests.rewards.samples import parts_of, sample


def test_reward_of_grounding() -> None:
    breakdown = score(sample("temporal_grounding"), "<answer>12.5 to 14</answer>", thinking=False)
    assert parts_of(breakdown) == {"format": 1, "iou": pytest.approx(1.5 / 4.5)}
    assert breakdown.total == pytest.approx(4 / 3)
    chatty = score(sample("temporal_grounding"), "So: <answer>from 12.5 to 14 s</answer>", thinking=False)
    assert chatty.total == pytest.approx(1 / 3)
    assert chatty.reasons == {"format": "text before <answer>"}


def test_grounding_metrics() -> None:
    scores = TASK.metrics(sample("temporal_grounding"), "12.5 to 14.75")  # half of 12.5 to 17
    assert scores.values == {"mIoU": 0.5, "R@0.3": 1, "R@0.5": 1, "R@0.7": 0}
    unreadable = TASK.metrics(sample("temporal_grounding"), "<answer>at noon</answer>")
    assert set(unreadable.values.values()) == {0}
    assert unreadable.reasons == {"iou": "no start and end"}
    assert TASK.metrics(sample("temporal_grounding"), "1 to 2").reasons == {"iou": "no overlap"}
