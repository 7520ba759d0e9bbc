from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings

from megatron_vcr1.data.templates import load_templates, target_text
from megatron_vcr1.rewards import RewardBreakdown, score
from megatron_vcr1.rewards.scoring import NOT_JUDGED
from megatron_vcr1.types import (
    Box,
    ChoiceTarget,
    GroundedChoiceTarget,
    Interval,
    QualityTarget,
    Task,
    TrackingTarget,
)
from tests.rewards.samples import BOXES, FRAGMENTS, completions, random_texts, sample

PARTS = {
    Task.TEMPORAL_GROUNDING: {"format", "iou"},
    Task.TRACKING: {"format", "iou"},
    Task.GROUNDED_QA: {"format", "iou", "accuracy"},
    Task.MULTIPLE_CHOICE_QA: {"format", "accuracy"},
    Task.CAPTIONING: {"format", "recall"},
    Task.QUALITY: {"format", "accuracy"},
}


def parts_of(breakdown: RewardBreakdown) -> dict[str, float]:
    parts = {name: getattr(breakdown, name) for name in ("format", "iou", "accuracy", "recall")}
    return {name: value for name, value in parts.items() if value is not None}


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("task", Task)
def test_the_sft_target_earns_the_full_reward(task: Task, thinking: bool) -> None:
    completion = "<think>It <timestep>1 to 2</timestep> is.</think>\n" * thinking + target_text(
        sample(task), load_templates()
    )
    recall = 1.0 if task is Task.CAPTIONING else None
    breakdown = score(sample(task), completion, thinking=thinking, recall=recall)
    assert parts_of(breakdown) == dict.fromkeys(PARTS[task], 1.0)
    assert breakdown.total == len(PARTS[task])
    assert breakdown.reasons == {}


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("task", [task for task in Task if task != Task.TRACKING])  # its example is shortened
def test_the_example_in_the_prompt_earns_the_format_reward(task: Task, thinking: bool) -> None:
    templates = load_templates()
    prompt = (templates.think if thinking else templates.answer)[task].template
    example = prompt[prompt.rindex("in this form:") + len("in this form:") :]
    assert score(sample(task), example, thinking=thinking).format == 1


def test_reward_of_grounding() -> None:
    breakdown = score(sample(Task.TEMPORAL_GROUNDING), "<answer>12.5 to 14</answer>", thinking=False)
    assert parts_of(breakdown) == {"format": 1, "iou": pytest.approx(1.5 / 4.5)}
    assert breakdown.total == pytest.approx(4 / 3)
    chatty = score(sample(Task.TEMPORAL_GROUNDING), "So: <answer>from 12.5 to 14 s</answer>", thinking=False)
    assert chatty.total == pytest.approx(1 / 3)
    assert chatty.reasons == {"format": "text before <answer>"}


def test_reward_of_grounded_qa() -> None:
    target_sample = sample(Task.GROUNDED_QA, GroundedChoiceTarget("B", (Interval(0, 10), Interval(20, 30))))
    breakdown = score(target_sample, "<answer>C</answer><glue>[(5, 25), (5, 7)]</glue>", thinking=False)
    assert parts_of(breakdown) == {"format": 1, "iou": pytest.approx(10 / 30), "accuracy": 0}
    assert breakdown.reasons == {"accuracy": "wrong option"}
    empty = score(target_sample, "<answer>B</answer><glue>[]</glue>", thinking=False)
    assert parts_of(empty) == {"format": 1, "iou": 0, "accuracy": 1}
    assert empty.reasons == {"iou": "no overlap"}
    damaged = score(target_sample, "<answer>B</answer><glue>[(0, 10), (30, 20)]</glue>", thinking=False)
    assert parts_of(damaged) == {"format": 0, "iou": 0, "accuracy": 1}
    assert damaged.reasons == {"format": "start after end", "iou": "start after end"}


def test_tracking_averages_over_all_frames() -> None:
    half = [Box(box.x0, box.y0, box.x1, (box.y0 + box.y1) / 2) for box in BOXES[:4]]
    rows = [[box.x0, box.y0, box.x1, box.y1] for box in half] + [[0.9, 0.9, 0.1, 0.1]] * 2 + [[0, 0, 640, 480]] * 2
    breakdown = score(sample(Task.TRACKING), f"<answer>{rows}</answer>", thinking=False)
    assert parts_of(breakdown) == {"format": 1, "iou": pytest.approx(4 * 0.5 / 8)}
    pixels = score(sample(Task.TRACKING), f"<answer>{[[10, 20, 300, 400]] * 8}</answer>", thinking=False)
    assert parts_of(pixels) == {"format": 1, "iou": 0}
    assert pixels.reasons == {"iou": "no valid box within 0..1"}


def test_tracking_has_as_many_boxes_as_its_target() -> None:
    four = sample(Task.TRACKING, TrackingTarget(BOXES[:4]))
    rows = [[box.x0, box.y0, box.x1, box.y1] for box in BOXES[:4]]
    assert score(four, f"<answer>{rows}</answer>", thinking=False).total == 2


@pytest.mark.parametrize(
    "completion, total, reasons",
    [
        ("<answer>(A) a dog</answer>", 2, {}),
        ("<answer>B</answer>", 1, {"accuracy": "wrong option"}),
        ("<answer></answer>", 1, {"accuracy": "no option letter"}),
        ("A", 0, {"format": "no <answer>", "accuracy": "no <answer>"}),
        ("<answer>A</answer> <answer>B</answer>", 1, {"accuracy": "wrong option"}),
    ],
)
def test_reward_of_multiple_choice(completion: str, total: float, reasons: dict[str, str]) -> None:
    breakdown = score(sample(Task.MULTIPLE_CHOICE_QA, ChoiceTarget("A")), completion, thinking=False)
    assert (breakdown.total, breakdown.reasons) == (total, reasons)


@pytest.mark.parametrize("answer, accuracy", [(" LOW quality\n", 1), ("low", 0), ("low quality.", 0), ("", 0)])
def test_a_quality_label_is_compared_case_insensitively(answer: str, accuracy: float) -> None:
    target_sample = sample(Task.QUALITY, QualityTarget("Low quality "))
    breakdown = score(target_sample, f"<answer>{answer}</answer>", thinking=False)
    assert breakdown.accuracy == accuracy
    assert breakdown.reasons.get("accuracy") == (None if accuracy else "wrong label")


def test_a_caption_without_a_judge_has_no_total() -> None:
    caption = sample(Task.CAPTIONING)
    unjudged = score(caption, "<answer>A dog.</answer>", thinking=False)
    assert (unjudged.format, unjudged.recall, unjudged.total) == (1, None, None)
    assert unjudged.reasons == {"recall": NOT_JUDGED}
    assert score(caption, "<answer>A dog.</answer>", thinking=False, recall=0.25).total == 1.25
    assert score(caption, "<answer>A dog.</answer>", thinking=False, recall=0).reasons == {
        "recall": "no event entailed"
    }


@pytest.mark.parametrize("completion, reason", [("A dog.", "no <answer>"), ("<answer> </answer>", "empty caption")])
def test_a_missing_caption_scores_0_without_a_judge(completion: str, reason: str) -> None:
    for recall in (None, 1.0):
        breakdown = score(sample(Task.CAPTIONING), completion, thinking=False, recall=recall)
        assert breakdown.recall == 0
        assert breakdown.reasons["recall"] == reason
        assert breakdown.total == breakdown.format


@pytest.mark.parametrize("task, recall", [(Task.CAPTIONING, 1.5), (Task.CAPTIONING, math.nan), (Task.QUALITY, 0.5)])
def test_an_invalid_recall_is_refused(task: Task, recall: float) -> None:
    with pytest.raises(ValueError, match=r"recall must be a number in \[0, 1\]"):
        score(sample(task), "<answer>x</answer>", thinking=False, recall=recall)


def test_rewards_need_no_torch() -> None:
    subprocess.run(
        [sys.executable, "-c", "import megatron_vcr1.rewards, sys; assert 'torch' not in sys.modules"], check=True
    )


def test_user_rewards_add_to_the_total() -> None:
    breakdown = score(sample(Task.QUALITY), "<answer>low quality</answer>", thinking=False)
    assert dataclasses.replace(breakdown, extra={"mine:brevity": -0.5}).total == 1.5


def check_reward(task: Task, completion: str) -> None:
    """Check that a reward is in range and complete, and has a reason for each zero and for nothing else."""
    for thinking in (False, True):
        breakdown = score(sample(task), completion, thinking=thinking, recall=0.5 if task is Task.CAPTIONING else None)
        parts = parts_of(breakdown)
        assert set(parts) == PARTS[task]
        assert all(0 <= value <= 1 for value in parts.values())
        assert breakdown.total == sum(parts.values())
        assert set(breakdown.reasons) == {name for name, value in parts.items() if value == 0}
        assert all(breakdown.reasons.values())


@pytest.mark.parametrize("task", Task)
@settings(deadline=None)
@given(completions)
def test_any_completion_has_a_reward(task: Task, completion: str) -> None:
    check_reward(task, completion)


@pytest.mark.parametrize("task", Task)
def test_ten_thousand_completions_have_a_reward(task: Task) -> None:
    for completion in random_texts(FRAGMENTS, 10_000):
        check_reward(task, completion)
