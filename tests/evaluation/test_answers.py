from __future__ import annotations

import pytest

from megatron_vcr1.evaluation.answers import is_tagged, read_answer, read_choice
from megatron_vcr1.rewards.parsing import UnparsableError


@pytest.mark.parametrize(
    "output, answer",
    [
        ("<think>1 to 2</think><answer> 3 to 4 </answer>", "3 to 4"),
        ("<answer>A</answer> no, <answer>B</answer>", "B"),
        (" 12.5 to 17 \n", "12.5 to 17"),
        ("B", "B"),
    ],
)
def test_the_tags_are_not_what_is_measured(output: str, answer: str) -> None:
    assert read_answer(output) == answer


@pytest.mark.parametrize(
    "output, reason",
    [
        ("", "empty answer"),
        (" \n", "empty answer"),
        ("<answer> </answer>", "empty answer"),
        ("<think>At 3 to 4 s, so B", "no <answer>"),
        ("<think>So B.</think> B", "no <answer>"),
        ("<answer>B", "<answer> not closed"),
        ("B<glue>[(1, 2)]</glue>", "no <answer>"),
    ],
)
def test_an_output_with_tags_and_without_an_answer_answers_nothing(output: str, reason: str) -> None:
    with pytest.raises(UnparsableError, match=f"^{reason}$"):
        read_answer(output)


def test_tagged() -> None:
    assert is_tagged("<think>x")
    assert not is_tagged("</answer> B")


@pytest.mark.parametrize(
    "output, letter",
    [
        ("B", "B"),
        ("(B) A dog", "B"),
        ("B. A dog", "B"),
        ("Answer: B", "B"),
        ("The answer is (C).", "C"),
        ("**D**", "D"),
        ("Both dogs: (C)", "C"),
        ("<think>A or B?</think><answer>G</answer>", "G"),
        ("Bananas", "B"),  # as published scripts have it
    ],
)
def test_the_letter_that_stands_alone_is_the_choice(output: str, letter: str) -> None:
    assert read_choice(output) == letter


@pytest.mark.parametrize("output", ["", "no idea", "H", "<think>B"])
def test_no_choice(output: str) -> None:
    with pytest.raises(UnparsableError):
        read_choice(output)
