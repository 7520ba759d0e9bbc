from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_vcr1.data.templates import load_templates, target_text
from megatron_vcr1.tasks import SampleMetrics, find_task, task_names, with_lenient
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


def all_metrics(task: str, output: str) -> SampleMetrics:
    strict = find_task(task).metrics(sample(task), output)
    return with_lenient(strict, find_task(task).lenient_metrics(sample(task), output, None))


def check_is_scored(task: str, output: str) -> None:
    scores = all_metrics(task, output)
    assert set(scores.values) == set(all_metrics(task, "").values)
    assert all(0 <= value <= 1 for value in scores.values.values())
    assert all(scores.reasons.values())
    for name, value in scores.values.items():  # the lenient reading never reads less
        if name.endswith(" (lenient)"):
            assert value >= scores.values[name.removesuffix(" (lenient)")]


@pytest.mark.parametrize("task", WITHOUT_JUDGE)
def test_lenient_metrics_stand_beside_the_strict_ones(task: str) -> None:
    """The lenient reading changes nothing in answers that the strict one reads, and never replaces its metrics."""
    right = target_text(sample(task), load_templates())
    scores = all_metrics(task, right)
    lenient = {name: value for name, value in scores.values.items() if name.endswith(" (lenient)")}
    assert lenient
    assert set(lenient.values()) == {1}
    assert not scores.is_lenient
    unclosed = all_metrics(task, right.replace("</answer>", "").replace("</glue>", ""))
    assert unclosed.is_lenient
    assert {name: unclosed.values[name] for name in lenient} == lenient
    assert all(unclosed.values[name.removesuffix(" (lenient)")] == 0 for name in lenient)
    nothing = all_metrics(task, "<think>I cannot tell")
    assert not nothing.is_lenient
    assert set(nothing.values.values()) == {0}


@pytest.mark.parametrize("task", WITHOUT_JUDGE)
@given(completions | st.text(max_size=30))
@example("</answer>12.5 to 17")
def test_any_output_is_scored(task: str, output: str) -> None:
    check_is_scored(task, output)


@pytest.mark.parametrize("task", WITHOUT_JUDGE)
def test_many_malformed_outputs_are_scored(task: str) -> None:
    for output in random_texts([fragment for fragment in FRAGMENTS if "<" not in fragment], 2000, max_fragments=6):
        check_is_scored(task, output)
