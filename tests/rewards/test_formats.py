from __future__ import annotations

import re
import time

import pytest

from megatron_vcr1.tasks import find_task, task_names
from tests.rewards.samples import random_texts, sample

TAGS = ("think", "answer", "glue")
TAG_FRAGMENTS = [*(f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")), " ", "\n", "\u2003", "x", "[]"]


def format_fault(task: str, completion: str, *, thinking: bool) -> str | None:
    return find_task(task).format_fault(sample(task), completion, thinking=thinking)


@pytest.mark.parametrize(
    "completion, thinking, fault",
    [
        ("<answer>1 to 2</answer>", False, None),
        (" \n<answer>\n1 to 2</answer>\n", False, None),
        ("<answer>anything</answer>", False, None),
        ("<think>x</think>\n\n<answer>1 to 2</answer>", True, None),
        ("<think></think><answer></answer>", True, None),
        ("", False, "no <answer>"),
        ("1 to 2", False, "no <answer>"),
        ("It is <answer>1 to 2</answer>", False, "text before <answer>"),
        ("<think>x</think><answer>1 to 2</answer>", False, "text before <answer>"),
        ("<answer>1 to 2</answer>.", False, "text after </answer>"),
        ("<answer>1 to 2", False, "<answer> not closed"),
        ("<answer>1 to 2</answer>", True, "no <think>"),
        ("<think>x", True, "<think> not closed"),
        ("<think>x</think> so <answer>1 to 2</answer>", True, "no <answer> right after </think>"),
        ("<think>x</think><answer>1", True, "<answer> not closed"),
        ("<think>an <answer> and a <glue>[(1, 2)]</glue></think><answer>1 to 2</answer>", True, None),
        ("<think>x<think>y</think><answer>1 to 2</answer>", True, "<think> inside <think>"),
        ("<think>x</think>y</think><answer>1 to 2</answer>", True, "no <answer> right after </think>"),
        ("<answer><think>x</think>1 to 2</answer>", False, "<think> inside <answer>"),
        ("<answer>1<answer>2</answer></answer>", False, "<answer> inside <answer>"),
        ("<answer>1 to 2</answer><answer>1 to 2</answer>", False, "a second turn"),
        ("<think>x</think><answer>1</answer>\n<think>y</think><answer>2</answer>", True, "a second turn"),
        ("<think>x</think><answer>1</answer><answer>2</answer>", True, "text after </answer>"),
    ],
)
def test_the_format_fault_is_named(completion: str, thinking: bool, fault: str | None) -> None:
    assert format_fault("temporal_grounding", completion, thinking=thinking) == fault


@pytest.mark.parametrize(
    "completion, fault",
    [
        ("<answer>A</answer><glue>[(1, 2)]</glue>", None),
        ("<answer>A</answer>\n<glue>[]</glue>", None),
        ("<answer>A</answer>", "no <glue> right after </answer>"),
        ("<answer>A</answer><glue>[(1, 2)", "<glue> not closed"),
        ("<answer>A</answer><glue>1 to 2</glue>", "no list of (start, end)"),
        ("<answer>A</answer><glue>[(2, 1)]</glue>", "start after end"),
        ("<answer>A</answer><glue>[(1, 2)]</glue><answer>A</answer><glue>[(1, 2)]</glue>", "a second turn"),
        ("<answer>A</answer><glue>[(1, 2)]</glue><glue>[(1, 2)]</glue>", "text after </glue>"),
        ("<answer>A <glue>[]</glue></answer><glue>[(1, 2)]</glue>", "<glue> inside <answer>"),
    ],
)
def test_grounded_qa_needs_parsable_spans(completion: str, fault: str | None) -> None:
    assert format_fault("grounded_qa", completion, thinking=False) == fault


@pytest.mark.parametrize(
    "num_boxes, box, fault",
    [(8, "[0, 0, 1, 1]", None), (8, "[0, 0, 640, 480]", None), (7, "[0, 0, 1, 1]", "wrong number of boxes")],
)
def test_tracking_needs_parsable_boxes(num_boxes: int, box: str, fault: str | None) -> None:
    completion = f"<answer>[{', '.join([box] * num_boxes)}]</answer>"
    assert format_fault("tracking", completion, thinking=False) == fault


def follows_format(completion: str, tags: list[str]) -> bool:
    """Match the format by a regular expression, which takes too long for texts of many tags."""
    free_text = {"think": "(?:(?!</?think>).)*"}
    no_tags = "(?:(?!</?(?:think|answer|glue)>).)*"
    pattern = r"\s*".join(f"<{tag}>{free_text.get(tag, no_tags)}</{tag}>" for tag in tags)
    return re.fullmatch(pattern, completion.strip(), re.DOTALL) is not None


@pytest.mark.parametrize("before", ["", "<think>", "<answer>", "<think></think><answer>"])
@pytest.mark.parametrize("after", ["", "</answer>", "</glue>", "</answer><glue>[]</glue>"])
def test_the_format_agrees_with_a_regular_expression(before: str, after: str) -> None:
    for middle in random_texts(TAG_FRAGMENTS, 500):
        completion = before + middle + after
        for thinking in (False, True):
            tags = [*["think"] * thinking, "answer"]
            fault = format_fault("quality", completion, thinking=thinking)
            assert (fault is None) == follows_format(completion, tags)
            fault = format_fault("grounded_qa", completion, thinking=thinking)
            follows = follows_format(completion, [*tags, "glue"])
            assert (fault in (None, "no list of (start, end)")) == follows  # it does not parse the list


@pytest.mark.parametrize("unit", [" ", "</think>", "</think> ", "</think><answer>", "</answer><glue>", "<answer>", "x"])
def test_checking_takes_linear_time(unit: str) -> None:
    """A pattern of lazy wildcards would try every pair of boundaries, which takes minutes. CPU time is measured."""
    text = "<think>" + (unit * 200_000)[:200_000]
    before_s = time.thread_time()
    for task in task_names():
        format_fault(task, text, thinking=True)
        format_fault(task, text + "</think><answer></answer><glue>", thinking=True)
    assert time.thread_time() - before_s < 5
