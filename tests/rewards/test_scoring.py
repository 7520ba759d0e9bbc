from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings

from megatron_vcr1.data.templates import load_templates, target_text
from megatron_vcr1.rewards import score
from megatron_vcr1.tasks import find_task, task_names
from tests.rewards.samples import FRAGMENTS, completions, parts_of, random_texts, sample

PARTS = {
    "temporal_grounding": {"format", "iou"},
    "tracking": {"format", "iou"},
    "grounded_qa": {"format", "iou", "accuracy"},
    "multiple_choice_qa": {"format", "accuracy"},
    "captioning": {"format", "recall"},
    "quality": {"format", "accuracy"},
    "numeric": {"format", "accuracy"},
    "free_form": {"format", "accuracy"},
}


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("task", task_names())
def test_the_sft_target_earns_the_full_reward(task: str, thinking: bool) -> None:
    completion = "<think>It <timestep>1 to 2</timestep> is.</think>\n" * thinking + target_text(
        sample(task), load_templates()
    )
    judged = 1.0 if task == "captioning" else None
    breakdown = score(sample(task), completion, thinking=thinking, judged=judged)
    assert parts_of(breakdown) == dict.fromkeys(PARTS[task], 1.0)
    assert breakdown.total == len(PARTS[task])
    assert breakdown.reasons == {}


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("task", [task for task in task_names() if task != "tracking"])  # its example is shortened
def test_the_example_in_the_prompt_earns_the_format_reward(task: str, thinking: bool) -> None:
    templates = load_templates()
    prompt = templates.of_task(find_task(task), thinking=thinking).template
    example = prompt[prompt.rindex("in this form:") + len("in this form:") :]
    assert score(sample(task), example, thinking=thinking).format == 1


@pytest.mark.parametrize("task, judged", [("captioning", 1.5), ("captioning", math.nan), ("quality", 0.5)])
def test_an_invalid_verdict_is_refused(task: str, judged: float) -> None:
    with pytest.raises(ValueError, match=r"judged must be in \[0, 1\]"):
        score(sample(task), "<answer>x</answer>", thinking=False, judged=judged)


def test_rewards_need_no_torch() -> None:
    subprocess.run(
        [sys.executable, "-c", "import megatron_vcr1.rewards, sys; assert 'torch' not in sys.modules"], check=True
    )


def test_user_rewards_add_to_the_total() -> None:
    breakdown = score(sample("quality"), "<answer>low quality</answer>", thinking=False)
    assert dataclasses.replace(breakdown, extra={"mine:brevity": -0.5}).total == 1.5


def check_reward(task: str, completion: str) -> None:
    """Check that a reward is in range and complete, and has a reason for each zero and for nothing else."""
    for thinking in (False, True):
        breakdown = score(sample(task), completion, thinking=thinking, judged=0.5 if task == "captioning" else None)
        parts = parts_of(breakdown)
        assert set(parts) == PARTS[task]
        assert all(0 <= value <= 1 for value in parts.values())
        assert breakdown.total == sum(parts.values())
        assert set(breakdown.reasons) == {name for name, value in parts.items() if value == 0}
        assert all(breakdown.reasons.values())


@pytest.mark.parametrize("task", task_names())
@settings(deadline=None)
@given(completions)
def test_any_completion_has_a_reward(task: str, completion: str) -> None:
    check_reward(task, completion)


@pytest.mark.parametrize("task", task_names())
def test_ten_thousand_completions_have_a_reward(task: str) -> None:
    for completion in random_texts(FRAGMENTS, 10_000):
        check_reward(task, completion)
