from __future__ import annotations

import pytest

from megatron_vcr1.rewards.answer_parsing import is_tagged, read_answer, read_choice
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
def test_an_answer_is_found_with_and_without_tags(output: str, answer: str) -> None:
    assert read_answer(output) == answer


@pytest.mark.parametrize(
    "output, reason",
    [
        ("", "empty answer"),
        (" \n", "empty answer"),
        ("<answer> </answer>", "empty answer"),
        ("<think>At 3 to 4 s, so B", "no <answer>"),
        ("<think>So B.</think> B", "no <answer>"),
        ("The prompt opened it: A or B?</think> B", "no <answer>"),
        ("<answer>B", "<answer> not closed"),
        ("B<glue>[(1, 2)]</glue>", "no <answer>"),
    ],
)
def test_an_output_with_tags_but_no_answer_is_unparsable(output: str, reason: str) -> None:
    with pytest.raises(UnparsableError, match=f"^{reason}$"):
        read_answer(output)


def test_opening_tags_and_the_end_of_the_reasoning_count_as_tags() -> None:
    assert is_tagged("<think>x") and is_tagged("x</think>")
    assert not is_tagged("</answer> B")


@pytest.mark.parametrize(
    "output, letter",
    [("B", "B"), ("(B) A dog", "B"), ("<think>A or B?</think><answer>c</answer>", "C"), ("The answer is a cat.", "B")],
)
def test_the_choice_is_read_from_the_answer(output: str, letter: str) -> None:
    assert read_choice(output, ("a dog", "a cat", "a cow")) == letter


@pytest.mark.parametrize("output", ["", "no idea", "H", "<think>B", "A or B", "Bananas"])
def test_an_output_that_does_not_choose_one_option_is_unparsable(output: str) -> None:
    with pytest.raises(UnparsableError):
        read_choice(output, ("a dog", "a cat", "a cow"))
