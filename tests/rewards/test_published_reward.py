"""The strict reward equals the published one on generated completions, except for the documented differences."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable

import pytest

from megatron_vcr1.rewards import score
from tests.rewards import published
from tests.rewards.samples import BOXES, sample

NUM_COMPLETIONS = 2000  # of each task: 10,000 in total
RIGHT_BOXES = str([[box.x0, box.y0, box.x1, box.y1] for box in BOXES])

REASONING = [
    *["The dog barks <timestep>1 to 2</timestep>.", "", "A or B?\n"] * 4,
    *("I put <answer>A</answer> here", "<glue>[(1, 2)]</glue>", "x<think>y", "x</think>y"),
]
ANSWERS: dict[str, list[str]] = {
    "temporal_grounding": [
        *["12.5 to 17", "12.5 and 16.25", " 10.00 to 20.00\n", "from 13 to 14 seconds", "1 to 2, rather 12 to 16"] * 3,
        *["17 to 12", "14 to 14", "12.5 - 17", "12.5 to", "at noon", "", "13. to 15.5", "12.5s to 17s", "1.2.3 to 14"],
        *(
            "[(12.5, 17)]",
            "12.5 To 17",
            "12.5  to 17",
            "12.5\nto 17",
            "-12.5 to 17",
            "1e1 to 17",
            "0:12 to 0:17",
            "१२ to १७",
        ),
    ],
    "tracking": [
        *[RIGHT_BOXES, f" {RIGHT_BOXES} ", RIGHT_BOXES.replace("], ", "],\n")] * 5,
        *[str([[0.1, 0.2, 0.5, 0.6]] * 8), str([[0.0, 0.0, 1.0, 1.0]] * 8), str([[0.1, 0.2, 0.5, 0.6]] * 7)] * 3,
        *(str([[0.1, 0.2, 0.5, 1.2]] * 8), str([[0.5, 0.2, 0.1, 0.6]] * 8), str([[0, 0, 640, 480]] * 8)),
        *(str([(0.1, 0.2, 0.5, 0.6)] * 8), str([["x"] * 4] * 8), "[]", "none", RIGHT_BOXES[:-1], "[[0x1, 0, 1, 1]]"),
        *(str([[0.1, 0.2, 0.5]] * 8), str([[True, False, True, True]] * 8), "[" + "[1_0, 0.0, 0.5, 1.0], " * 8 + "]"),
    ],
    "grounded_qa": ["B", "B", "(B)", " B\n", "B.", "C", "(B) a cat", "A", "", "none", "b", "A or B", "Answer: B"],
    "multiple_choice_qa": [
        *["A", "(A)", "A.", " A\n", "B", "(A) a dog", "The answer is A", "The best answer is (B)", "C. a cow"] * 3,
        *["G", "H", "", "none", "the first one"],
        *("a", "Answer: A", "A or B", "ABC", "a dog", "Ａ", "A cat", "The dog, so (A)", "Both, B", "Best: A"),  # noqa: RUF001
    ],
    "quality": ["low quality", " Low Quality\n", "LOW QUALITY", "high quality", "low", "low quality.", ""],
}
GLUES = [
    *["[(1, 2.25), (4, 5)]", "[(1.0, 2.25)]", "[(0,3),(4, 5)]", "[(1, 5),]", "[(1, 2), (1.5, 4.5)]"] * 4,
    *["[(2, 1)]", "[(7, 8)]", "[(1, 1)]", "(1, 2)", "[[1, 2]]", "[(1, 2, 3)]", "", "null", "[]"],
    *(
        "[ (1, 2) ]",
        " [(1, 2)]",
        "[(1 ,2)]",
        "[(-1, 2)]",
        "[(1e0, 2)]",
        "[(1., 2)]",
        "[(.5, 2)]",
        "[(१, २)]",
        "[(01, 2)]",
    ),
]


def turn(rng: random.Random, task: str, thinking: bool) -> str:
    """Write a turn in the form that the prompt asks for."""
    reasoning = f"<think>{rng.choice(REASONING)}</think>" + rng.choice(["", "\n", " \n"])
    answer = f"<answer>{rng.choice(ANSWERS[task])}</answer>"
    glue = rng.choice(["", "\n"]) + f"<glue>{rng.choice(GLUES)}</glue>"
    return reasoning * thinking + answer + glue * (task == "grounded_qa")


def completion(rng: random.Random, task: str, thinking: bool) -> str:
    """Write a turn that is right in three of five cases, and otherwise has one fault of its form."""
    text = turn(rng, task, thinking)
    tag = rng.choice(["<think>", "</think>", "<answer>", "</answer>", "<glue>", "</glue>"])
    faults: list[Callable[[], str]] = [
        lambda: text.replace(tag, "", 1),
        lambda: text + rng.choice([" Done.", "<|im_end|>", tag]),
        lambda: rng.choice(["So: ", "\ufeff", tag]) + text,
        lambda: text + rng.choice(["", "\n"]) + turn(rng, task, thinking),
        lambda: turn(rng, task, not thinking),
        lambda: text[: rng.randrange(len(text) + 1)],
        lambda: text.replace("<answer>", "<answer>x<answer>"),
    ]
    return rng.choice(faults)() if rng.random() < 0.4 else text


def tags_are_simple(text: str) -> bool:
    """Return whether each tag occurs once at most, in the order of the format."""
    found = [name for name in re.findall("<(/?(?:think|answer|glue))>", text)]
    order = ["think", "/think", "answer", "/answer", "glue", "/glue"]
    return found == [name for name in order if name in found]


def answer_of(text: str) -> str:
    return (published.blocks(text, "answer") or [""])[-1]


def glue_of(text: str) -> str:
    return (published.blocks(text, "glue") or [""])[0]


def one_plain_letter(answer: str) -> bool:
    """Return whether the answer holds one of the letters A to G only, which stands alone, and no option's text."""
    alone = re.findall(r"(?<!\w)[A-G](?!\w)(?! [a-z])", answer)
    return len(alone) == len(re.findall("[A-Ga-g]", re.sub("The (best )?answer is", "", answer))) == 1


UNUSUAL_NUMBER = re.compile(r"-\d|\de|\d:\d|[^\W\d_a-zA-Z]|[\u0966-\u096f]|\d\.(?!\d)|(?<!\d)\.\d|[(\s]0\d", re.ASCII)

# The documented differences (`score`): the parts of the reward, and whether a completion may differ for this reason.
DIFFERENCES: dict[str, tuple[tuple[str, ...], Callable[[str], bool]]] = {
    "tags within blocks, and which block counts": (
        ("format", "iou", "accuracy"),
        lambda text: not tags_are_simple(text),
    ),
    "lists of spans in grounding": (
        ("iou",),
        lambda text: answer_of(text).startswith("[("),
    ),
    "white space around 'to'": (
        ("iou",),
        lambda text: re.search(r"\d(?!\S| \S)\s+to|\d\s+to\s(?!\S)", answer_of(text), re.IGNORECASE) is not None,
    ),
    "white space in <glue>": (
        ("format", "iou"),
        lambda text: re.search(r"^\s|\s$|[\[(]\s|\s[\]),]", glue_of(text)) is not None,
    ),
    "signs, exponents, clock times and other digits": (
        ("format", "iou"),
        lambda text: UNUSUAL_NUMBER.search(answer_of(text) + glue_of(text)) is not None,
    ),
    "boxes that are Python and not numbers": (
        ("format",),
        lambda text: re.search(r"_|True|'x'|0x", answer_of(text)) is not None,
    ),
    "option letters and texts": (("accuracy",), lambda text: not one_plain_letter(answer_of(text))),
    "boxes beyond the frame": (
        ("iou",),
        lambda text: re.search(r"\[\[.*(1\.[1-9]|[1-9]\d|_|True)", answer_of(text)) is not None,
    ),
}


@pytest.fixture(scope="module")
def comparison() -> tuple[Counter[str], Counter[str], list[str]]:
    """Parts compared, parts that differ for one reason only, and completions that differ for no documented reason."""
    rng = random.Random(5)
    compared: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    unexplained = []
    for task in ANSWERS:
        for number in range(NUM_COMPLETIONS):
            thinking = number % 2 == 0
            text = completion(rng, task, thinking)
            ours = score(sample(task), text, thinking=thinking)
            for part, expected in published.reward_parts(sample(task), text, thinking=thinking).items():
                compared["all"] += 1
                compared["positive"] += expected > 0
                if getattr(ours, part) == pytest.approx(expected, abs=1e-12):
                    compared["equal"] += 1
                    continue
                because = [name for name, (parts, applies) in DIFFERENCES.items() if part in parts and applies(text)]
                reasons.update(because if len(because) == 1 else [])
                if not because:
                    unexplained.append(f"{task} {part} {text!r}: {getattr(ours, part)} instead of {expected}")
    return compared, reasons, unexplained


def test_every_difference_from_the_published_reward_is_documented(
    comparison: tuple[Counter[str], Counter[str], list[str]],
) -> None:
    assert comparison[2] == []


def test_the_completions_are_varied_enough_to_show_every_difference(
    comparison: tuple[Counter[str], Counter[str], list[str]],
) -> None:
    compared, reasons, _ = comparison
    assert compared["all"] > 20_000
    assert compared["equal"] > 0.8 * compared["all"]
    assert compared["positive"] > 0.4 * compared["all"]
    assert set(reasons) == set(DIFFERENCES)
