from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vcr1.rewards.parsing import (
    UnparsableError,
    first_glue,
    last_answer,
    parse_boxes,
    parse_interval,
    parse_spans,
)
from megatron_vcr1.types import Box, Interval
from tests.rewards import published
from tests.rewards.samples import FRAGMENTS, boxes, random_texts

TIMES = st.floats(0, 1e6).map(lambda value: round(value, 2))
INTERVALS = st.tuples(TIMES, TIMES).filter(lambda pair: pair[0] != pair[1]).map(lambda pair: Interval(*sorted(pair)))
SPACE = st.text(" \t\n", max_size=2)


@pytest.mark.parametrize(
    "completion, expected",
    [
        ("<answer>A</answer>", "A"),
        ("<answer>A</answer> no, <answer> B\n</answer>", "B"),
        ("<answer>A</answer><answer>B", "A"),
        ("<answer>A<answer>B</answer></answer>", "B"),
        ("<think>in <answer> I put A</think><answer>B</answer>", "B"),
        ("</answer><answer>A</answer>", "A"),
        ("<answer></answer>", ""),
        ("<answer>A</answer><think>or <answer>B</answer></think>", "A"),
        ("<think>at first <answer>A</answer></think><answer>B</answer><think>", "B"),
        ("<think>is never closed <answer>A</answer>", "A"),
    ],
)
def test_the_last_closed_answer_counts(completion: str, expected: str) -> None:
    assert last_answer(completion) == expected


def test_the_first_glue_counts() -> None:
    assert first_glue("<glue> [(1, 2)]</glue><glue>[(3, 4)]</glue>") == "[(1, 2)]"
    assert first_glue("<think><glue>[(1, 2)]</glue></think><glue>[(3, 4)]</glue>") == "[(3, 4)]"
    # The chat templates of Thinking editions open <think> in the prompt.
    assert first_glue("at first <glue>[(1, 2)]</glue></think><glue>[(3, 4)]</glue>") == "[(3, 4)]"
    assert first_glue("<glue>[(1, 2)]</glue></think>") == "[(1, 2)]", "no block follows"


@pytest.mark.parametrize(
    "completion, reason",
    [
        ("", "no <answer>"),
        ("A</answer>", "no <answer>"),
        ("<Answer>A</Answer>", "no <answer>"),
        ("<answer>A", "<answer> not closed"),
        ("</answer><answer>", "<answer> not closed"),
        ("<think><answer>A</answer></think>", "no <answer>"),
        ("<think>a<think><answer>A</answer></think>", "no <answer>"),
    ],
)
def test_a_missing_answer_has_a_reason(completion: str, reason: str) -> None:
    with pytest.raises(UnparsableError, match=f"^{reason}$"):
        last_answer(completion)


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("12.54 to 17.83", (12.54, 17.83)),
        ("12 and 17", (12, 17)),
        ("first 1 to 2, rather 12. to 17.5 s", (12, 17.5)),
        ("1 to 2 to 3", (1, 2)),
        ("at 10-12 to 17", (12, 17)),
        ("1e1 to 1.7e1", (10, 17)),
        ("seconds:12 to 17: there", (12, 17)),
        ("12.5 To 17", (12.5, 17)),
        ("12 AND 17.5", (12, 17.5)),
        ("12\t to\n 17", (12, 17)),
        ("12\u00a0to\u202f17", (12, 17)),
    ],
)
def test_the_last_start_and_end_count(answer: str, expected: tuple[float, float]) -> None:
    assert parse_interval(answer) == Interval(*expected)


@pytest.mark.parametrize(
    "answer, reason",
    [
        ("", "no start and end"),
        ("null", "no start and end"),
        ("NaN to inf", "no start and end"),
        ("१२ to १७", "no start and end"),  # Devanagari digits, which Python's \d and float() accept
        ("12 - 17", "no start and end"),
        ("12to17", "no start and end"),
        ("12 total 17", "no start and end"),
        ("1:00 to 2:30", "clock times instead of seconds"),
        ("00:01:00.5 to 90", "clock times instead of seconds"),
        ("1 to 2:30", "clock times instead of seconds"),
        ("12 to seventeen", "no start and end"),
        ("17 to 12", "start after end"),
        ("12 to 12", "start equals end"),
        ("-5 to 10", "negative time"),
        ("(-5 to 10)", "negative time"),
        ("-5 to -10", "negative time"),
        ("1 to 1e400", "time is not finite"),
        ("1e400 to 5", "time is not finite"),
        ("1 to " + "9" * 400, "time is not finite"),
    ],
)
def test_an_invalid_interval_has_a_reason(answer: str, reason: str) -> None:
    with pytest.raises(UnparsableError, match=f"^{reason}$"):
        parse_interval(answer)


@pytest.mark.parametrize(
    "glue, expected",
    [
        ("[(5.2, 10.4)]", [(5.2, 10.4)]),
        ("[(1,2),(4, 5),]", [(1, 2), (4, 5)]),
        ("[ ( 1 , 2 ) ]", [(1, 2)]),
        ("[(3, 3), (4, 5)]", [(4, 5)]),
        ("[]", []),
    ],
)
def test_lists_of_spans_are_parsed(glue: str, expected: list[tuple[float, float]]) -> None:
    assert parse_spans(glue) == tuple(Interval(*span) for span in expected)


NOT_LISTS_OF_SPANS = [
    *("", "null", "(1, 2)", "[1, 2]", "[[1, 2]]", "[(1, 2)", "[(1, 2)] s", "[(1, 2) (3, 4)]", "[(1,)]", "[()]", "[,]"),
    *(
        "[(nan, 2)]",
        "[(1, inf)]",
        "[(None, 2)]",
        "[(१, २)]",
        "[(1_0, 20)]",
        "[((1, 2))]",
        "[(1, 2), [3, 4]]",
        "[" * 1000,
    ),
]


@pytest.mark.parametrize("glue", NOT_LISTS_OF_SPANS)
def test_a_text_that_is_not_a_list_of_spans_is_unparsable(glue: str) -> None:
    with pytest.raises(UnparsableError, match=r"^no list of \(start, end\)$"):
        parse_spans(glue)


@pytest.mark.parametrize(
    "glue, reason",
    [
        ("[(1, 2, 3)]", "a span is not two numbers"),
        ("[(1)]", "a span is not two numbers"),
        ("[(1, 2), (4, 3)]", "start after end"),
        ("[(-1, 2)]", "negative time"),
        ("[(1, 1e400)]", "time is not finite"),
    ],
)
def test_a_bad_span_makes_the_list_unparsable(glue: str, reason: str) -> None:
    with pytest.raises(UnparsableError, match=f"^{reason}$"):
        parse_spans(glue)


def test_boxes_that_are_inverted_or_out_of_range_are_none() -> None:
    good = "[0, .25, 1., 7.5e-1]"
    bad = ["[0.5, 0, 0.4, 1]", "[0, 0, 0, 1]", "[-0.1, 0, 1, 1]", "[0, 0, 640, 480]", "[0, 0, 1, 1e400]"]
    parsed = parse_boxes(f"[{', '.join([good, *bad])}]", 6)
    assert parsed == (Box(0, 0.25, 1, 0.75), None, None, None, None, None)


@pytest.mark.parametrize(
    "answer, reason",
    [
        ("[[0, 0, 1, 1]]", "wrong number of boxes"),
        ("[]", "wrong number of boxes"),
        ("[[0, 0, 1, 1], [0, 0, 1]]", "a box is not four numbers"),
        ("[0, 0, 1, 1]", "no list of boxes"),
        ("[(0, 0, 1, 1), (0, 0, 1, 1)]", "no list of boxes"),
        ("[[0, 0, 1, 1], [0, 0, 1, NaN]]", "no list of boxes"),
        ("[[0, 0, 1, 1], null]", "no list of boxes"),
        ("[[0, 0, 1, 1], ...]", "no list of boxes"),
    ],
)
def test_unparsable_boxes_have_a_reason(answer: str, reason: str) -> None:
    with pytest.raises(UnparsableError, match=f"^{reason}$"):
        parse_boxes(answer, 2)


@settings(deadline=None)
@given(INTERVALS, TIMES, TIMES)
def test_a_formatted_interval_is_parsed_back(interval: Interval, other_s: float, another_s: float) -> None:
    assert parse_interval(f"{other_s} to {another_s}, or {interval.start_s} to {interval.end_s}") == interval


@settings(deadline=None)
@given(st.lists(INTERVALS, max_size=5), SPACE, SPACE)
def test_formatted_spans_are_parsed_back(spans: list[Interval], left: str, right: str) -> None:
    rows = [f"{left}({span.start_s!r}{right},{left}{span.end_s!r}){right}" for span in spans]
    assert parse_spans(f"[{','.join(rows)}]") == tuple(spans)


@settings(deadline=None)
@given(st.lists(boxes, min_size=1, max_size=9))
def test_formatted_boxes_are_parsed_back(original: list[Box]) -> None:
    rows = [[box.x0, box.y0, box.x1, box.y1] for box in original]  # str() of a float can be read back exactly
    assert parse_boxes(str(rows), len(original)) == tuple(original)


def test_blocks_equal_those_of_the_published_pattern() -> None:
    """Blocks within the reasoning do not count; if a tag is opened again inside its block, the block starts there."""
    tags = [fragment for fragment in FRAGMENTS if fragment.startswith("<")]
    for completion in random_texts([*tags * 4, *FRAGMENTS], 10_000):
        outside = re.sub("<think>.*?</think>", "", completion, flags=re.DOTALL)
        after = outside.rpartition("</think>")[2]  # the prompt may have opened the reasoning
        outside = after if any(published.blocks(after, tag) for tag in ("answer", "glue")) else outside
        for tag, parse, index in (("answer", last_answer, -1), ("glue", first_glue, 0)):
            if blocks := published.blocks(outside, tag):
                assert parse(completion) == blocks[index].rpartition(f"<{tag}>")[2].strip()
            else:
                with pytest.raises(UnparsableError):
                    parse(completion)


def test_times_equal_those_of_the_published_pattern() -> None:
    """Signs, exponents and clock times, where the two differ on purpose, do not occur in these texts."""
    num_parsed = 0
    for answer in random_texts([*"01237. \n", *[" to ", " and ", " To "] * 4, "12.5", "9."], 30_000):
        times = published.last_times(answer)
        if times is not None and times[0] < times[1]:
            assert parse_interval(answer) == Interval(*times)
            num_parsed += 1
        else:
            with pytest.raises(UnparsableError, match="start and end" if times is None else "start (after|equals) end"):
                parse_interval(answer)
    assert num_parsed > 1000


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def is_list(parse: Callable[[], object]) -> bool:
    try:
        parse()
    except UnparsableError as error:
        return not str(error).startswith("no list")
    return True


def test_numbers_in_lists_equal_those_of_python() -> None:
    """Python's underscores between digits are the only exception."""
    num_parsed = 0
    for number in random_texts([*"0369.+-eE_ "], 30_000, max_fragments=6):
        expected = is_number(number)
        assert is_list(partial(parse_spans, f"[(1, {number})]")) == expected
        assert is_list(partial(parse_boxes, f"[[0, 0, 1, {number}]]", 1)) == expected
        num_parsed += expected
    assert num_parsed > 1000


NUM_CHARACTERS = 200_000
HOSTILE = [
    *("9", "9.", ".", "-", "1e", "1e5", " ", " to ", "1 to ", "1 to 2 ", "9 ", "(", "[", "[(", "(1,", "(1,2),", "[1,"),
    *(
        "9:",
        "1,",
        "[1, 2, 3, 4],",
        "[(1, 2), ",
        ", ",
        "<answer>",
        "</answer>",
        "<answer></answer>",
        "<answer>1 to 2</answer>",
    ),
    *(
        "<glue>",
        "</glue>",
        "</answer><glue>",
        "<glue>[(1,2)]</glue>",
        "<think>",
        "</think> ",
        "<",
        "A",
        "A ",
        "A, ",
        "B.",
        "not ",
        "answer: ",
        "answer is A or ",
        "\0",
    ),
]
PARSERS = [
    last_answer,
    first_glue,
    parse_interval,
    parse_spans,
    lambda text: parse_boxes(text, 8),
]


def parse_with_all(text: str) -> None:
    for parse in PARSERS:
        with contextlib.suppress(UnparsableError):
            parse(text)


@pytest.mark.parametrize("unit", HOSTILE)
def test_any_text_takes_linear_time(unit: str) -> None:
    """Linear time is milliseconds; quadratic time (4e10 steps) is minutes. CPU time is immune to a busy machine."""
    body = (unit * NUM_CHARACTERS)[:NUM_CHARACTERS]
    before_s = time.thread_time()
    for text in (body, f"[{body}", f"[({body}", f"[{body}]", f"1 {body}", f"<answer>{body}", f"{body}1 to 2"):
        parse_with_all(text)
    assert time.thread_time() - before_s < 5
