from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vcr1.data.templates import load_templates, target_text
from megatron_vcr1.tasks import find_task, task_names
from tests.rewards.samples import FRAGMENTS, completions, random_texts, sample

WITHOUT_JUDGE = [name for name in task_names() if not find_task(name).needs_judge(sample(name))]


@pytest.mark.parametrize("task", WITHOUT_JUDGE)
def test_the_target_text_scores_1_in_every_metric(task: str) -> None:
    correct = sample(task)
    scores = find_task(task).metrics(correct, target_text(correct, load_templates()))
    # NExT-GQA's single predicted span cannot cover both of two annotated spans.
    expected = {
        name: 1.25 / 1.25 if "IoU" not in name or correct.task != "grounded_qa" else pytest.approx(1)
        for name in scores.values
    }
    assert scores.values == expected
    assert scores.reasons == {}


def check_is_scored(task: str, output: str) -> None:
    scores = find_task(task).metrics(sample(task), output)
    assert set(scores.values) == set(find_task(task).metrics(sample(task), "").values)
    assert all(0 <= value <= 1 for value in scores.values.values())
    assert all(scores.reasons.values())


@pytest.mark.parametrize("task", WITHOUT_JUDGE)
@given(completions | st.text(max_size=30))
def test_any_output_is_scored(task: str, output: str) -> None:
    check_is_scored(task, output)


@pytest.mark.parametrize("task", WITHOUT_JUDGE)
def test_many_malformed_outputs_are_scored(task: str) -> None:
    for output in random_texts([fragment for fragment in FRAGMENTS if "<" not in fragment], 2000, max_fragments=6):
        check_is_scored(task, output)
