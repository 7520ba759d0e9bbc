from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vcr1.rewards.lenient import lenient_answer, lenient_boxes, lenient_glue, lenient_label, lenient_spans
from megatron_vcr1.rewards.parsing import (
    UnparsableError,
    first_glue,
    last_answer,
    parse_boxes,
    parse_interval,
    parse_spans,
)
from megatron_vcr1.types import Box, Interval
from tests.rewards.samples import FRAGMENTS, completions, random_texts

T = TypeVar("T")

ONE_SPAN = {
    "units": ["12.5s to 15s", "12.5 seconds to 15 sec", "from 12.5 s until 15 s", "12.5s and 15s", "12.5to15"],
    "dashes": ["12.5 - 15.0", "12.5-15", "12.5–15", "12.5 — 15 s", "12.5 ~ 15", "12.5 -> 15"],  # noqa: RUF001
    "pairs": ["[12.5, 15]", "(12.5, 15.0)", "[(12.5, 15)]", "[[12.5, 15]]", "12.5, 15", "12.5 15", '["12.5s", "15s"]'],
    "objects": [
        '{"start": 12.5, "end": 15}',
        "{'start_time': '12.5', 'end_time': '15'}",
        '```json\n{"event": "a dog", "start": 12.5, "end": 15.0}\n```',
        '{"timestamps": [[12.5, 15]]}',
        '{"from": 12.5, "to": 15}',
    ],
    "sentences": [
        "The event starts at 12.5 s and ends at 15 s.",
        "Start: 12.5s, End: 15s",
        "It happens at 12.5 - 15.0 seconds (2.5 s in total).",
        "First 3s to 4s, rather 12.5s to 15s",
    ],
    "markup": ["**12.5** to **15**", "$12.5$ - $15$", "`12.5s` to `15s`"],
    "Chinese": [
        *("12.5到15秒", "从12.5秒至15秒", "12.5 秒到 15 秒之间", "第12.5秒到第15秒", "【12.5、15】"),
        *("１２.５～１５", "（12.5，15）", "开始时间：12.5秒，结束时间：15秒"),  # noqa: RUF001
    ],
}


@pytest.mark.parametrize("answer", [answer for answers in ONE_SPAN.values() for answer in answers])
def test_a_span_is_read_in_every_usual_form(answer: str) -> None:
    assert lenient_spans(answer) == (Interval(12.5, 15),)


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("from 00:12 to 00:15", [(12, 15)]),
        ("0:01:05.5 - 0:01:10", [(65.5, 70)]),
        ('{"start": "01:05", "end": "01:10"}', [(65, 70)]),
        ("1 min 5 s to 1 min 10 s", [(65, 70)]),
        ("1m5s - 2m", [(65, 120)]),
        ("1 - 2 minutes", [(60, 120)]),
        ("2 minutes and 3 seconds to 2 minutes and 10 seconds", [(123, 130)]),
        ("from 10 seconds to 1 minute and 20 seconds", [(10, 80)]),
        ("between 1 minute and 90 seconds", [(60, 90)]),
        ("1h2m3s to 1 hour, 2 minutes and 10 seconds", [(3723, 3730)]),
        ("1 - 2 Hours", [(3600, 7200)]),
        ("00:01:23,400 --> 00:01:25,000", [(83.4, 85)]),
        ("[1:05,130]", [(65, 130)]),
        ("[0 min, 30 s]", [(0, 30)]),
        ("(0 m, 45.5 s)", [(0, 45.5)]),
        ("0 min, 30 s", [(0, 30)]),
        ("90 min 75 s to 100 min", [(5475, 6000)]),
        ("from 1 min 75 s to 3 min", [(135, 180)]),
        ("第 3 秒 到 第 7 秒", [(3, 7)]),
        ("1分5秒到2分", [(65, 120)]),
        ("00：12 到 00：15", [(12, 15)]),  # noqa: RUF001
        ("[[1, 2], [3, 4.5]]", [(1, 2), (3, 4.5)]),
        ('[{"start": 1, "end": 2}, {"start": 3, "end": 4.5}]', [(1, 2), (3, 4.5)]),
        ("[(1, 2), (3, 3)]", [(1, 2)]),
    ],
)
def test_clock_times_units_and_lists_of_spans(answer: str, expected: list[tuple[float, float]]) -> None:
    assert lenient_spans(answer) == tuple(Interval(*span) for span in expected)


@pytest.mark.parametrize(
    "answer, reason",
    [
        ("", "no start and end"),
        ("at 12 s", "no start and end"),
        ("frame 3 of 10", "no start and end"),
        ("12s to late", "no start and end"),
        ("15s to 12s", "start after end"),
        ("[15, 12]", "start after end"),
        ("12s to 12s", "start equals end"),
        ("-5s to 12s", "negative time"),
        ("[-5, 12]", "negative time"),
        ("1 - " + "9" * 400, "time is not finite"),
    ],
)
def test_what_states_no_valid_span_is_unparsable(answer: str, reason: str) -> None:
    with pytest.raises(UnparsableError, match=f"^{reason}$"):
        lenient_spans(answer)


@pytest.mark.parametrize(
    "output, answer",
    [
        ("<think>x</think><answer> A </answer>", "A"),
        ("<ANSWER>A</Answer>", "A"),
        ("<answer>A", "A"),
        ("A</answer>", "A"),
        ("<think>x</think> A", "A"),
        ("the prompt opens it</think>\n\nA", "A"),
        ("A<glue>[(1, 2)]</glue>", "A"),
        ("<answer>A<glue>[(1, 2)]</glue>", "A"),
        ("A", "A"),
        ("< answer >A</ answer >", "A"),
        ("<answer>A</ans", "A"),
        ("<answer>A<", "A"),
    ],
)
def test_an_answer_is_found_with_incomplete_tags(output: str, answer: str) -> None:
    assert lenient_answer(output) == answer


@pytest.mark.parametrize(
    "output", ["", " ", "<answer></answer>", "<think>A", "<think>so <answer>A", "<think>A</think>"]
)
def test_an_output_that_ends_within_its_reasoning_has_no_answer(output: str) -> None:
    with pytest.raises(UnparsableError):
        lenient_answer(output)


@pytest.mark.parametrize(
    "output, expected",
    [
        ("<answer>B</answer><glue>[[1, 2.5]]</glue>", [(1, 2.5)]),
        ("<answer>B</answer><glue>1s to 2.5s</glue>", [(1, 2.5)]),
        ("<answer>B</answer><glue>[(1, 2.5)]", [(1, 2.5)]),
        ('{"answer": "B", "glue": [[1, 2.5], [4, 5]]}', [(1, 2.5), (4, 5)]),
        ("<think><glue>[(7, 8)]</glue></think>B [(1, 2.5)]", [(1, 2.5)]),
        ("<answer>B</answer><glue>[]</glue>", []),
    ],
)
def test_spans_of_grounded_qa_are_read_in_other_forms(output: str, expected: list[tuple[float, float]]) -> None:
    assert lenient_glue(output) == tuple(Interval(*span) for span in expected)


HALVES = (Box(0, 0, 0.5, 1), Box(0.5, 0, 1, 0.25))


@pytest.mark.parametrize(
    "answer",
    [
        "[[0, 0, .5, 1], [0.5, 0, 1, 0.25]]",
        "The boxes: (0, 0, 0.5, 1), (0.5, 0, 1, 0.25).",
        "[0, 0, 0.5, 1, 0.5, 0, 1, 0.25]",
        "[[-0.1, 0, 0.5, 1.02], [0.5, -1, 1.5, 0.25]]",  # cut at the frame
        "[[0，0，0.5，1]，【0.5，0，1，0.25】]",  # noqa: RUF001
        '```json\n[{"bbox_2d": [0, 0, 500, 1000], "label": "dog"}, {"bbox_2d": [500, 0, 1000, 250]}]\n```',
        "[[0, 0, 500, 1000], [500, 0, 1000, 250],]",
        "<|box_start|>(0,0),(500,1000)<|box_end|> <|box_start|>(500,0),(1000,250)<|box_end|>",
    ],
)
def test_boxes_in_fractions_and_thousandths(answer: str) -> None:
    assert lenient_boxes(answer, 2) == HALVES


def test_pixels_need_the_size_of_the_frame() -> None:
    answer = '[{"bbox_2d": [0, 0, 640, 480]}, {"bbox_2d": [640, 0, 1280, 120]}]'
    assert lenient_boxes(answer, 2, (1280, 480)) == HALVES
    with pytest.raises(UnparsableError, match="boxes in pixels of a frame of unknown size"):
        lenient_boxes(answer, 2)
    # The frame is too small for pixels, so these are thousandths.
    assert lenient_boxes("[[0, 0, 500, 1000], [500, 0, 1000, 250]]", 2, (640, 480)) == HALVES


@pytest.mark.parametrize(
    "answer, reason",
    [
        ("no idea", "no list of boxes"),
        ("[[0, 0, 1, 1]]", "wrong number of boxes"),
        ("[0, 0, 1, 1, 0, 0, 1]", "no list of boxes"),
        ("[0, 0, 1, 1, 0, 0, 1, 1, 1]", "wrong number of boxes"),
        ("[[0.5, 0, 0.4, 1], [1.5, 0, 2, 1]]", "no valid box"),
        ("[[1e999, 0, 1e999, 1], [1e999, 0, 1e999, 1]]", "boxes in pixels of a frame of unknown size"),
    ],
)
def test_boxes_that_cannot_be_read_have_a_reason(answer: str, reason: str) -> None:
    with pytest.raises(UnparsableError, match=f"^{reason}$"):
        lenient_boxes(answer, 2)


@pytest.mark.parametrize(
    "answer",
    [
        *("low quality", '"Low Quality"', "low  quality.", "**low quality**", "The answer is low quality."),
        *("Quality: low quality", '{"label": "low quality"}', "The video quality is 'low quality'.", "['low quality']"),
        *("答案是low quality。", "low quality！"),  # noqa: RUF001
    ],
)
def test_labels_are_read_without_what_surrounds_them(answer: str) -> None:
    assert lenient_label(answer) == "low quality"


def test_other_labels_are_kept() -> None:
    assert lenient_label("not low quality") == "not low quality"
    assert lenient_label("") == ""


def strictly(read: Callable[[], T]) -> T | None:
    """Return what the strict parsing reads; None if that is nothing."""
    try:
        return read()
    except UnparsableError:
        return None


def check_agreement(text: str) -> None:
    """Check that each lenient reader returns what the strict one returns, wherever that reads something."""
    if interval := strictly(lambda: parse_interval(text)):
        assert lenient_spans(text) == (interval,)
    if (spans := strictly(lambda: parse_spans(first_glue(text)))) is not None:
        assert lenient_glue(text) == spans
    if answer := strictly(lambda: last_answer(text)):
        assert lenient_answer(text) == answer
    boxes = strictly(lambda: parse_boxes(text, 8)) or ()
    for frame_size in (None, (640, 480)) if any(boxes) else ():
        read = lenient_boxes(text, 8, frame_size)
        assert all(ours == box for ours, box in zip(read, boxes, strict=True) if box is not None)


TIMES = st.floats(0, 2000).map(lambda value: round(value, 2))
FORMS = st.sampled_from(["{} to {}", "{} To {}", "at {} and  {} s", "[[{}, {}]] or {} to {}", "{}s - {}s, {} to {}"])
SPANS = st.tuples(FORMS, TIMES, TIMES, TIMES, TIMES).map(lambda parts: parts[0].format(*parts[1:]))
ROWS = st.lists(st.lists(st.floats(-0.5, 1000) | st.floats(0, 1), min_size=4, max_size=4), min_size=8, max_size=8)


@settings(deadline=None)
@given(completions | st.text(max_size=30) | SPANS | ROWS.map(str))
def test_the_lenient_reading_agrees_with_the_strict_one(text: str) -> None:
    check_agreement(text)


def test_the_readings_agree_on_many_malformed_texts() -> None:
    untagged = [fragment for fragment in FRAGMENTS if "<" not in fragment]
    for text in [*random_texts(FRAGMENTS, 3000), *random_texts(untagged, 3000, max_fragments=5)]:
        check_agreement(text)


NUM_CHARACTERS = 100_000
HOSTILE = [
    *(
        "9",
        "9.",
        "9:",
        "9 ",
        "9 s ",
        "9m",
        "9 m 9 s",
        "1 - ",
        "1-",
        "1 to ",
        "[",
        "[1",
        "[1,",
        "[1, 2],",
        "(1,2),",
        "- ",
    ),
    *("start", "start 1 ", "start: 1, end: ", '"from": 1', "<answer>", "<glue>", "<think>", "</think>", "<ANSWER>"),
    *("1 min, 2 s ", "1 h 2 m, 3 s ", "1:05,130 "),
    *("[1, 2, 3, 4],", "1, ", "(1,2),(3,4)", " ", "\n", "the answer is ", "quality: ", "{", '"', "."),
]
READERS = [lenient_answer, lenient_spans, lenient_glue, lambda text: lenient_boxes(text, 8), lenient_label]


@pytest.mark.parametrize("unit", HOSTILE)
def test_any_text_takes_linear_time(unit: str) -> None:
    """Linear time is milliseconds; quadratic time (1e10 steps) is minutes in every try.

    CPU time hardly depends on a busy machine, but a virtual one may count what its host does for it, such as paging.
    """
    body = (unit * NUM_CHARACTERS)[:NUM_CHARACTERS]

    def read_all_s() -> float:
        before_s = time.thread_time()
        for text in (body, f"[{body}", f"[{body}]", f"<answer>{body}", f"{body}1 - 2"):
            for read in READERS:
                with contextlib.suppress(UnparsableError):
                    read(text)
        return time.thread_time() - before_s

    assert any(read_all_s() < 5 for _ in range(3))
