"""Lenient reading of answers, for evaluation and for served models: it reads what a careful human would understand.

The strict parsing (`parsing`) decides the reward in training, and the metrics as published. A model that was not
trained on the forms that the prompts ask for may state the right answer in another form, such as "12.3s - 15s", a JSON
object or boxes in pixels. Metrics of the lenient reading stand beside the strict ones and never replace them.

Every function returns what the strict parsing returns wherever that reads something. Like the strict parsing, every
function accepts any text and takes time linear in its length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from megatron_vcr1.rewards.parsing import (
    UnparsableError,
    check_times,
    first_glue,
    last_answer,
    parse_box_rows,
    parse_boxes,
    parse_event_spans,
    parse_spans,
    with_ascii_forms,
    without_reasoning,
)
from megatron_vcr1.types import Box, Interval

T = TypeVar("T")
Row = tuple[float, ...]

_TAG = re.compile(r"<\s*+(/?)\s*+(think|answer|glue)\s*+>", re.IGNORECASE)
_ENDS = " .,;:!?*`'\"()[]{}<>“”‘’。、\n\t"  # noqa: RUF001 - what may surround a label
_LABEL_NAME = r"(?:answer|label|quality|rating|答案|标签)"
_LABEL_LEAD = re.compile(rf"[\s{{\"'*]*(?:the\s+)?(?:\w+\s+)?{_LABEL_NAME}[\"'*]*\s*(?:is\b|[:=是为])", re.IGNORECASE)
_CUT_TAG = re.compile(r"<(?:/[a-z]*)?\Z")  # the beginning of a closing tag, at which an output was cut

_PUNCTUATION = str.maketrans("【】〔〕、〜", "[][],~", "*`$")  # noqa: RUF001 - markup is removed
_CHINESE_UNIT = re.compile(r"(?<=[0-9])\s?(小时|小時|分钟|分鐘|分|秒钟|秒鐘|秒)")
_UNITS = {"小": " h ", "分": " min ", "秒": " s "}  # by the first character of the Chinese unit

_DECIMAL = r"[0-9]++(?:\.[0-9]*+)?+"
_SIXTIETHS = r"[0-5]?[0-9](?![0-9])(?:\.[0-9]*+)?+"  # minutes after hours, seconds after minutes
_SECONDS = r"\s?s(?:ec(?:ond)?s?)?(?![A-Za-z])"
_MINUTES = r"\s?m(?:in(?:ute)?s?)?(?![A-Za-z])"
_HOURS = r"\s?h(?:(?:ou)?rs?)?(?![A-Za-z])"
_CLOCK = r"[0-9]++(?::[0-9]{1,2}){1,2}+(?:\.[0-9]++|,[0-9]{3}(?![0-9:]))?"  # 1:05, 00:01:05.5, 00:01:05,500
_AND = r"(?:,?\s(?:and\s)?+|,)?+"  # between the units of a moment
# These tails are not possessive: "[0 min, 30 s]" and "[1:05,130]" are two moments, not one.
_MORE_SECONDS = rf"(?:{_AND}{_SIXTIETHS}{_SECONDS}|\s?{_DECIMAL}{_SECONDS})"
_MORE_MINUTES = rf"(?:{_AND}{_SIXTIETHS}{_MINUTES}{_MORE_SECONDS}?)"
_MOMENT = (
    rf"(?:{_CLOCK}|{_DECIMAL}{_HOURS}(?:{_MORE_MINUTES}|{_MORE_SECONDS})?|{_DECIMAL}{_MINUTES}{_MORE_SECONDS}?"
    rf"|{_DECIMAL}(?:{_SECONDS})?+)"
)
# A match must not start within a number, after the minutes of a clock time, or after a sign.
_START = r"(?<![0-9.])(?<![0-9]:)((?:(?<!\w)-)?+"
_RANGE = re.compile(
    rf"{_START}{_MOMENT})\s*+(?:[-–—~→到至]|--?>|(?:to|and|until|till|through)(?![A-Za-z]))\s*+第?\s*+(-?+{_MOMENT})",  # noqa: RUF001
    re.IGNORECASE,
)
_PAIR = re.compile(rf"[\[(]\s*+[\"']?(-?+{_MOMENT})[\"']?\s*+,\s*+[\"']?(-?+{_MOMENT})[\"']?\s*+[\])]", re.IGNORECASE)
_START_AND_END = re.compile(
    rf"(?<![a-z])(?:start|begin|开始|[\"']from[\"'])[^0-9<>]{{0,40}}?((?:(?<!\w)-)?+{_MOMENT})"
    rf"[^0-9<>]{{0,40}}?(?<![a-z])(?:end|finish|stop|结束|[\"']to[\"'])[^0-9<>]{{0,40}}?((?:(?<!\w)-)?+{_MOMENT})",
    re.IGNORECASE,
)
_BARE_PAIR = re.compile(rf"\s*+(-?+{_MOMENT})(?:\s*+[,;]\s*+|\s++)(-?+{_MOMENT})[\s.]*+", re.IGNORECASE)

_NUMBER = rf"[+-]?+(?:{_DECIMAL}|\.[0-9]++)(?:[eE][+-]?+[0-9]++)?+"
_NUMBERS = rf"{_NUMBER}(?:\s*+,\s*+{_NUMBER})"
_BOX_ROW = re.compile(rf"[\[(]\s*+({_NUMBERS}{{3}}+)\s*+[\])]")
_CORNERS = re.compile(rf"\(\s*+({_NUMBERS}{{1}}+)\s*+\)\s*+,?\s*+\(\s*+({_NUMBERS}{{1}}+)\s*+\)")
_FLAT_BOXES = re.compile(rf"[\[(]\s*+({_NUMBERS}{{7,}}+)\s*+,?\s*+[\])]")
_LARGEST_FRACTION = 2.0
"""Largest coordinate of an answer in fractions of the frame; boxes that extend beyond it are cut at the frame."""


def leniently(strict: Callable[[], T], lenient: Callable[[], T]) -> T:
    """Return what the strict function reads, or else what the lenient one reads.

    Raises:
        UnparsableError: neither of them reads anything; the reason is that of the strict function.
    """
    try:
        return strict()
    except UnparsableError as unparsable:
        try:
            return lenient()
        except UnparsableError:
            raise unparsable from None


def lenient_answer(output: str) -> str:
    """Return the answer in an output.

    Besides the last ``<answer>``, this reads tags in upper case, an answer whose closing tag was cut off (by a stop
    string or the token limit), text after ``</think>`` without an ``<answer>``, and an output without tags.

    Raises:
        UnparsableError: the output has no answer, or was cut within its reasoning.
    """
    text = without_reasoning(_with_lower_case_tags(output))
    try:
        answer = last_answer(text)
    except UnparsableError as unparsable:
        before, opening, rest = text.rpartition("<answer>")
        # Chat templates may open <think> in the prompt; then the output only closes it.
        rest = rest if opening else rest.rpartition("</think>")[2]
        if "<think>" in (before if opening else rest):
            raise unparsable
        answer = _CUT_TAG.sub("", re.sub(r"<glue>[^<]*+(?:</glue>)?|</answer>", "", rest)).strip()
    if not answer:
        raise UnparsableError("empty answer")
    return answer


def lenient_spans(answer: str) -> tuple[Interval, ...]:
    """Read the time spans that an answer states, at least one.

    Besides "12.3 to 15", this reads units (``12.3s to 15 seconds``, ``1 min 5 s``), clock times (``00:12 to 00:15``),
    dashes (``12.3 - 15``), pairs and lists of pairs (``[12.3, 15]``), and JSON objects and sentences with a start and
    an end; with full-width punctuation and in Chinese, too. Of several ranges in prose the last one counts, as in the
    strict reading; of pairs and objects, all count.

    Raises:
        UnparsableError: the answer states no span, or an invalid one.
    """
    try:
        return parse_event_spans(answer)
    except UnparsableError as unparsable:
        answer = _CHINESE_UNIT.sub(lambda unit: _UNITS[unit[1][0]], _plain(answer))
        pairs = _PAIR.findall(answer) or _START_AND_END.findall(answer) or _RANGE.findall(answer)[-1:]
        if not pairs and (bare := _BARE_PAIR.fullmatch(answer)):
            pairs = [bare.groups()]
        if not pairs:
            raise unparsable
    spans = [_seconds_of_pair(*pair) for pair in pairs]
    for start_s, end_s in spans:
        check_times(start_s, end_s)
    intervals = tuple(Interval(start_s, end_s) for start_s, end_s in spans if start_s < end_s)
    if not intervals:
        raise UnparsableError("start equals end")
    return intervals


def lenient_glue(output: str) -> tuple[Interval, ...]:
    """Read the spans of grounded QA, possibly none: from ``<glue>``, also unclosed, or else from the whole output.

    Raises:
        UnparsableError: the output states no spans, or an invalid one.
    """
    text = without_reasoning(_with_lower_case_tags(output))
    try:
        return parse_spans(first_glue(text))
    except UnparsableError:
        return lenient_spans(text.partition("<glue>")[2].partition("</glue>")[0] or text)


def lenient_boxes(answer: str, num_boxes: int, frame_size: tuple[int, int] | None = None) -> tuple[Box | None, ...]:
    """Read a list of boxes that may be embedded in text, JSON objects (``bbox_2d``) or a fenced block.

    The unit of the coordinates is decided for the answer as a whole: fractions of the frame, if all of them are at most
    2; pixels, if the size of the frame is known and contains all boxes; thousandths of the frame, if all are at most
    1000. Boxes are cut at the frame.

    Args:
        answer: the answer, without tags.
        num_boxes: number of boxes that it should state.
        frame_size: width and height in pixels of the frames that the model saw; None if unknown.

    Returns:
        The boxes as fractions of the frame; None for a box that is inverted or outside of the frame.

    Raises:
        UnparsableError: the answer does not state `num_boxes` boxes, or no box is within the frame.
    """
    rows = _box_rows(answer, num_boxes)
    boxes: list[Box | None]
    try:
        boxes = list(parse_boxes(answer, num_boxes))
    except UnparsableError:
        boxes = [None] * num_boxes
    width, height = (1.0, 1.0) if any(boxes) else _unit_of_boxes(rows, frame_size)
    boxes = [box or _cut_box(row, width, height) for box, row in zip(boxes, rows, strict=True)]
    if not any(boxes):
        raise UnparsableError("no valid box")
    return tuple(boxes)


def lenient_label(answer: str) -> str:
    """Return a label in lower case, without quotes, markup, final punctuation and words such as "The answer is"."""
    answer = with_ascii_forms(answer)
    lead = _LABEL_LEAD.match(answer)
    label = answer[lead.end() :] if lead else answer
    return " ".join(label.casefold().split()).strip(_ENDS)


def _with_lower_case_tags(output: str) -> str:
    """Return an output with its tags in lower case and without white space in them."""
    return _TAG.sub(lambda tag: f"<{tag[1]}{tag[2].lower()}>", output)


def _plain(text: str) -> str:
    """Return a text with the punctuation of ASCII, and without markup."""
    return with_ascii_forms(text).translate(_PUNCTUATION)


def _seconds_of_pair(start: str, end: str) -> tuple[float, float]:
    """Convert two moments to seconds; a unit after the second one alone, as in "1 to 2 min", holds for both."""
    start_s = _seconds(start)
    if not re.search(r"[:a-z]", start, re.IGNORECASE):
        start_s *= 3600 if re.search(rf"{_HOURS}\s*$", end, re.IGNORECASE) else 1
        start_s *= 60 if re.search(rf"{_MINUTES}\s*$", end, re.IGNORECASE) else 1
    return start_s, _seconds(end)


def _seconds(moment: str) -> float:
    """Convert a moment such as "12.5", "12.5 s", "1 min 5 s" or "0:01:05" to seconds."""
    sign = -1 if moment.startswith("-") else 1
    moment = moment.removeprefix("-").lower()
    if ":" in moment:
        seconds = 0.0
        for part in moment.replace(",", ".").split(":"):
            seconds = seconds * 60 + float(part)
        return sign * seconds
    seconds_of = {"h": 3600, "m": 60, "s": 1, "": 1}
    parts = re.findall(rf"({_DECIMAL})\s?([hms]?)", moment)
    return sign * sum(float(number) * seconds_of[unit] for number, unit in parts)


def _box_rows(answer: str, num_boxes: int) -> list[Row]:
    """Return the four numbers of each box. Raises UnparsableError unless there are `num_boxes` boxes."""
    try:
        return parse_box_rows(answer, num_boxes)
    except UnparsableError:
        answer = _plain(answer)
        rows = [_numbers(row) for row in _BOX_ROW.findall(answer)]
        rows = rows or [_numbers(f"{first},{second}") for first, second in _CORNERS.findall(answer)]
        if not rows and (flat := _FLAT_BOXES.search(answer)):
            numbers = _numbers(flat[1])
            rows = [numbers[start : start + 4] for start in range(0, len(numbers), 4)]
        if not rows:
            raise
    if len(rows) != num_boxes or any(len(row) != 4 for row in rows):
        raise UnparsableError("wrong number of boxes")
    return rows


def _numbers(text: str) -> Row:
    return tuple(map(float, text.split(",")))


def _unit_of_boxes(rows: Sequence[Row], frame_size: tuple[int, int] | None) -> tuple[float, float]:
    """Return the width and the height of the frame in the unit of the coordinates."""
    largest_x, largest_y = max(max(row[::2]) for row in rows), max(max(row[1::2]) for row in rows)
    largest = max(largest_x, largest_y)
    if largest <= _LARGEST_FRACTION:
        return 1.0, 1.0
    if frame_size is not None and largest_x <= frame_size[0] and largest_y <= frame_size[1]:
        return float(frame_size[0]), float(frame_size[1])
    if largest <= 1000:
        return 1000.0, 1000.0
    raise UnparsableError("boxes in pixels of a frame of unknown size")


def _cut_box(row: Row, width: float, height: float) -> Box | None:
    """Return the part of a box that is within the frame; None if there is none, or a number is not finite."""
    if not all(map(math.isfinite, row)):
        return None
    x0, y0, x1, y1 = row[0] / width, row[1] / height, row[2] / width, row[3] / height
    try:
        return Box(max(x0, 0.0), max(y0, 0.0), min(x1, 1.0), min(y1, 1.0))
    except ValueError:
        return None
