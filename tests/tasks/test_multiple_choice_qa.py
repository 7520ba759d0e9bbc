from __future__ import annotations

import pytest

from megatron_vcr1.rewards import score
from megatron_vcr1.tasks.multiple_choice_qa import ChoiceTarget
from tests.rewards.samples import sample


@pytest.mark.parametrize(
    "completion, total, reasons",
    [
        ("<answer>(A) a dog</answer>", 2, {}),
        ("<answer>B</answer>", 1, {"accuracy": "wrong option"}),
        ("<answer></answer>", 1, {"accuracy": "no option letter"}),
        ("A", 0, {"format": "no <answer>", "accuracy": "no <answer>"}),
        ("<answer>A</answer> <answer>B</answer>", 0, {"format": "a second turn", "accuracy": "wrong option"}),
    ],
)
def test_reward_of_multiple_choice(completion: str, total: float, reasons: dict[str, str]) -> None:
    breakdown = score(sample("multiple_choice_qa", ChoiceTarget("A")), completion, thinking=False)
    assert (breakdown.total, breakdown.reasons) == (total, reasons)
