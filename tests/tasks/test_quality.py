from __future__ import annotations

import pytest

from megatron_vcr1.rewards import score
from megatron_vcr1.tasks.quality import TASK, QualityTarget
from tests.rewards.samples import sample


@pytest.mark.parametrize("answer, accuracy", [(" LOW quality\n", 1), ("low", 0), ("low quality.", 0), ("", 0)])
def test_a_quality_label_is_compared_case_insensitively(answer: str, accuracy: float) -> None:
    target_sample = sample("quality", QualityTarget("Low quality "))
    breakdown = score(target_sample, f"<answer>{answer}</answer>", thinking=False)
    assert breakdown.accuracy == accuracy
    assert breakdown.reasons.get("accuracy") == (None if accuracy else "wrong label")


def test_quality_ignores_case() -> None:
    assert TASK.metrics(sample("quality"), "Low Quality").values == {"accuracy": 1}
    assert TASK.metrics(sample("quality"), "high").reasons == {"accuracy": "wrong label"}
