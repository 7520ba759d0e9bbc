"""Strict parsing of completions: tagged blocks, and the spans and boxes in them.

This is what the reward reads in training. `choices` reads option letters, and `lenient` reads what the strict parsing
does not, for evaluation.

A policy may emit any text. Every function accepts any text, runs in time linear in its length, and either returns a
value or raises `UnparsableError`. Patterns use possessive quantifiers (`*+`, `++`, `?+`), so that the regex engine
never backtracks into a number that it has matched. Spans and boxes are made of ASCII digits only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from megatron_vcr1.types import Box, Interval

_DECIMAL = r"[0-9]++(?:\.[0-9]*+)?+"
_EXPONENT = r"(?:[eE][+-]?+[0-9]++)?+"
_TIME = rf"(?:[0-9]++:(?=[0-9]))*+{_DECIMAL}{_EXPONENT}"  # 12.5, or a clock time such as 1:05
# The lookbehinds keep a match from starting in the middle of a number or clock time. Starting there would find nothing
# new, and would take quadratic time on a long run of digits.
_TIMES = re.compile(rf"(?<![0-9])(?<![0-9]:)((?:(?<!\w)-)?+{_TIME})\s++(?i:to|and)\s++(-?+{_TIME})")


def _list_of_rows(opening: str, closing: str) -> re.Pattern[str]:
    """Compile a pattern for a possibly empty list of rows of numbers; a comma after the last row is allowed.

    Args:
        opening, closing: patterns of the brackets of a row.
    """
    number = rf"[+-]?+(?:{_DECIMAL}|\.[0-9]++){_EXPONENT}"
    row = rf"{opening}\s*+{number}(?:\s*+,\s*+{number})*+\s*+{closing}"
    return re.compile(rf"\[\s*+(?:{row}(?:\s*+,\s*+{row})*+\s*+,?+)?+\s*+\]", re.ASCII)


_SPAN_LIST = _list_of_rows(r"\(", r"\)")
_BOX_LIST = _list_of_rows(r"\[", r"\]")
_ROW = re.compile(r"[(\[]([^()\[\]]++)[)\]]")


_ASCII_FORMS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width forms of ! to ~
_ASCII_FORMS |= {0x3000: ord(" "), 0x2212: ord("-")}  # ideographic space, minus sign


def with_ascii_forms(text: str) -> str:
    """Replace full-width letters, digits and punctuation (as in Chinese texts) and the minus sign by those of ASCII."""
    return text.translate(_ASCII_FORMS)


class UnparsableError(ValueError):
    """Raised if a completion cannot be parsed. There is a small set of messages, so that they can be counted."""


def last_answer(completion: str) -> str:
    """Return the text of the last ``<answer>`` block, stripped. A block within the reasoning is not the answer.

    Raises:
        UnparsableError: there is no complete block.
    """
    text = without_reasoning(completion)
    answers = list(_blocks(text, "answer"))
    return _require_block(answers[-1] if answers else None, text, "answer")


def first_glue(completion: str) -> str:
    """Return the text of the first ``<glue>`` block, stripped. A block within the reasoning is not the glue.

    Raises:
        UnparsableError: there is no complete block.
    """
    text = without_reasoning(completion)
    return _require_block(next(_blocks(text, "glue"), None), text, "glue")


def without_reasoning(completion: str) -> str:
    """Return the text without its closed ``<think>`` blocks.

    A ``<think>`` that is never closed is kept, so that an answer after it still counts. Chat templates may open
    ``<think>`` in the prompt: text before a ``</think>`` that was never opened is reasoning, too, if a block follows.
    """
    opening, closing = "<think>", "</think>"
    kept, position = [], 0
    while (start := completion.find(opening, position)) >= 0 and (end := completion.find(closing, start)) >= 0:
        kept.append(completion[position:start])
        position = end + len(closing)
    text = "".join([*kept, completion[position:]])
    rest = text.rpartition(closing)[2]
    return rest if any(next(_blocks(rest, tag), None) is not None for tag in ("answer", "glue")) else text


def parse_interval(answer: str) -> Interval:
    """Parse the last ``START to END`` (or ``START and END``, in any case) in seconds.

    Unlike in the published reward, a sign, an exponent and the minutes of a clock time are part of their number. The
    published reward reads "-5 to 9" as 5 to 9, "1e400 to 500" as 400 to 500, and "1:00 to 2:30" as 0 to 2.

    Raises:
        UnparsableError: the text has no start and end, or they do not form a valid span.
    """
    times = _TIMES.findall(answer)
    if not times:
        raise UnparsableError("no start and end")
    if any(":" in time for time in times[-1]):
        raise UnparsableError("clock times instead of seconds")
    start_s, end_s = map(float, times[-1])
    check_times(start_s, end_s)
    if start_s == end_s:
        raise UnparsableError("start equals end")
    return Interval(start_s, end_s)


def parse_spans(glue: str) -> tuple[Interval, ...]:
    """Parse a list of ``(start, end)`` in seconds, possibly empty. Spans of length 0 are dropped.

    Raises:
        UnparsableError: the text is not such a list, or a span is invalid.
    """
    spans = []
    for row in _parse_rows(glue, _SPAN_LIST, "no list of (start, end)"):
        if len(row) != 2:
            raise UnparsableError("a span is not two numbers")
        start_s, end_s = row
        check_times(start_s, end_s)
        if start_s < end_s:
            spans.append(Interval(start_s, end_s))
    return tuple(spans)


def parse_event_spans(answer: str) -> tuple[Interval, ...]:
    """Parse the spans of an event, at least one: a list of ``(start, end)``, or else the last ``START to END``.

    Raises:
        UnparsableError: the text has neither form, or a span is invalid.
    """
    if _SPAN_LIST.fullmatch(answer):
        if spans := parse_spans(answer):
            return spans
        raise UnparsableError("no start and end")
    return (parse_interval(answer),)


def parse_boxes(answer: str, num_boxes: int) -> tuple[Box | None, ...]:
    """Parse a list of `num_boxes` boxes ``[x0, y0, x1, y1]``; a box that is inverted or outside of 0..1 is None.

    Raises:
        UnparsableError: the text is not such a list, or has another number of boxes or of numbers in a box.
    """
    return tuple(_box(*row) for row in parse_box_rows(answer, num_boxes))


def parse_box_rows(answer: str, num_boxes: int) -> list[tuple[float, ...]]:
    """Parse the four numbers of each box like `parse_boxes`, without checking that the box is valid."""
    rows = _parse_rows(answer, _BOX_LIST, "no list of boxes")
    if len(rows) != num_boxes:
        raise UnparsableError("wrong number of boxes")
    if any(len(row) != 4 for row in rows):
        raise UnparsableError("a box is not four numbers")
    return rows


def parse_caption(completion: str) -> str:
    """Return the caption for the judge: the last answer.

    Raises:
        UnparsableError: there is no answer, or it is empty.
    """
    caption = last_answer(completion)
    if not caption:
        raise UnparsableError("empty caption")
    return caption


def _blocks(text: str, tag: str) -> Iterator[str]:
    """Yield the text between each ``<tag>`` and the next ``</tag>``.

    If the tag is opened again before it is closed, the block starts at the last opening tag.
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    end = 0
    while (start := text.find(opening, end)) >= 0 and (end := text.find(closing, start)) >= 0:
        yield text[text.rfind(opening, start, end) + len(opening) : end]


def _require_block(block: str | None, completion: str, tag: str) -> str:
    """Return the text of a block, stripped; if there is none, raise an error that says whether the tag was opened."""
    if block is None:
        raise UnparsableError(f"<{tag}> not closed" if f"<{tag}>" in completion else f"no <{tag}>")
    return block.strip()


def _parse_rows(text: str, pattern: re.Pattern[str], mismatch_reason: str) -> list[tuple[float, ...]]:
    """Parse the rows of a list; raise `mismatch_reason` if the text does not match the pattern of the list."""
    if not pattern.fullmatch(text):
        raise UnparsableError(mismatch_reason)
    # The search starts at character 1, after the opening bracket of the list itself.
    return [tuple(map(float, row.split(","))) for row in _ROW.findall(text, 1)]


def check_times(start_s: float, end_s: float) -> None:
    """Raise UnparsableError unless 0 <= start <= end, both finite."""
    if not (math.isfinite(start_s) and math.isfinite(end_s)):
        raise UnparsableError("time is not finite")
    if start_s < 0 or end_s < 0:
        raise UnparsableError("negative time")
    if start_s > end_s:
        raise UnparsableError("start after end")


def _box(x0: float, y0: float, x1: float, y1: float) -> Box | None:
    try:
        return Box(x0, y0, x1, y1)
    except ValueError:
        return None
