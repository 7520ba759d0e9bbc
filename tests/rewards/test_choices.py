from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vcr1.rewards import score
from megatron_vcr1.rewards.choices import parse_choice
from megatron_vcr1.rewards.parsing import UnparsableError
from megatron_vcr1.types import OPTION_LETTERS
from tests.rewards.samples import sample

OPTIONS = ("a dog", "A cat", "5 %", "Both A and B", "a man with sign (C)")

CHOSEN = {
    "the letter alone": ["B", "b", " B\n", "B.", "(B)", "[b]", "**B**", "`B`", "_B_", '"B"', r"$\boxed{B}$", "B)"],
    "full width": ["Ｂ", "ｂ", "（Ｂ）", "Ｂ．", "答案：Ｂ", "选B"],  # noqa: RUF001
    "the letter and a text": ["(B) A cat", "B. A cat", "b: a cat", "B a cat", "B\nBecause it barks.", "B.a cat"],
    "a declaration": ["Answer: B", "answer: b", "The answer is (B).", "The best option is B", "It is B", "Option B"],
    "a declaration among others": [
        "I thought A. The answer is B.",
        "Options: (A) a dog (B) a cat. Answer: B",
        "The correct answer is option B; A shows a dog.",
        r"A or D? \boxed{B}",
    ],
    "rejected others": [
        "B, not A",
        "The answer can't be A; it must be B",
        "B because A is wrong",
        "(B) is right, (A) is incorrect",
    ],
    "a label at the start": ["B. He takes vitamin C", "(B) the team of D"],
    "its own text": ["a cat", "A cat.", '"a  CAT"', "The answer is a cat.", "Answer: A cat", "answer: (B) A cat"],
    "JSON": ['{"answer": "B"}', '{"option": "B", "reason": "A cat is shown."}'],
}
NOT_CHOSEN = {
    "several options": [
        *("A or B", "A, B", "(A) (B)", "A/B", "a and b", "A. B. C.", "(A) a dog (B) a cat", "B and (A)", "B A"),
        *("The answer is A or B", "The answer is A. The answer is B.", "A. or B", "Ａ、Ｂ"),  # noqa: RUF001
    ],
    "no option letter": [
        *("", " ", "H", "G", "1", "...", "A snake", "a snake", "It is a snake.", "Bananas", "HBA", "ABCD", "Answer"),
        *("vitamin-C", "D'Artagnan", "e.g. this", "at 5 a.m.", "D.C.", "C'est ici", "not A", "It isn't B", "Ädel"),
    ],
}


@pytest.mark.parametrize("answer", [answer for answers in CHOSEN.values() for answer in answers])
def test_an_answer_that_chooses_b(answer: str) -> None:
    assert parse_choice(answer, OPTIONS) == "B"


@pytest.mark.parametrize("reason, answer", [(reason, answer) for reason in NOT_CHOSEN for answer in NOT_CHOSEN[reason]])
def test_an_answer_that_chooses_no_option(reason: str, answer: str) -> None:
    with pytest.raises(UnparsableError, match=f"^{reason}$"):
        parse_choice(answer, OPTIONS)


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("A", "A"),
        ("a", "A"),
        ("A is correct", "A"),
        ("The answer is a", "A"),
        ("A dog", "A"),
        ("5%", None),
        ("5 %", "C"),
        ("-5 %", None),
        ("Both A and B", "D"),
        ("(E) a man with sign (C)", "E"),
        ("a man with sign (C)", "E"),
        ("E: a man with sign (C), as the first scene shows.", "E"),
        ("(A) a dog, (B) a cat", None),
    ],
)
def test_articles_and_letters_in_option_texts(answer: str, letter: str | None) -> None:
    if letter is None:
        with pytest.raises(UnparsableError):
            parse_choice(answer, OPTIONS)
    else:
        assert parse_choice(answer, OPTIONS) == letter


def test_a_letter_is_a_label_before_it_is_an_options_text() -> None:
    assert parse_choice("b", ("b", "a", "c")) == "B"
    assert parse_choice("(C) e", ("l", "v", "e")) == "C"
    assert parse_choice("e", ("l", "v", "e")) == "C"  # there is no option E


def test_two_options_with_the_same_text_are_not_chosen_by_it() -> None:
    with pytest.raises(UnparsableError):
        parse_choice("the dog", ("the dog", "The dog."))
    assert parse_choice("(B) the dog", ("the dog", "The dog.")) == "B"


FORMS = ["{}", "({})", "{}.", "{})", "**{}**", "Answer: {}", "The answer is {}.", "The answer is ({}).", "Option {}"]


@settings(deadline=None)
@given(st.sampled_from(FORMS), st.sampled_from(OPTION_LETTERS), st.booleans())
def test_every_letter_is_read_in_every_form(form: str, letter: str, lower: bool) -> None:
    answer = form.format(letter.lower() if lower else letter)
    assert parse_choice(answer, tuple(f"option number {number}" for number in range(7))) == letter


@settings(deadline=None)
@given(st.text(alphabet="ABCabc .,()\n/:'-andor", max_size=20))
def test_any_choice_is_one_of_the_options(answer: str) -> None:
    try:
        assert parse_choice(answer, ("a dog", "a cat")) in "AB"
    except UnparsableError as error:
        assert str(error) in ("no option letter", "several options")


@pytest.mark.parametrize("answer, accuracy", [("Answer: A", 1), ("(a)", 1), ("a dog", 1), ("A, B, C", 0), ("A cow", 0)])
def test_the_reward_reads_choices_alike(answer: str, accuracy: float) -> None:
    breakdown = score(sample("multiple_choice_qa"), f"<answer>{answer}</answer>", thinking=False)
    assert (breakdown.format, breakdown.accuracy) == (1, accuracy)
