"""Reading the values of manifest rows: each function takes a decoded JSON value and its key, which errors name.

`TEXT`, `NUMBER` and the other constants are the forms of values in a task's target; `list_of` and `choice_of` make
further ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from megatron_vcr1.types import Box, Interval

T = TypeVar("T")
E = TypeVar("E", bound=StrEnum)


class RowError(ValueError):
    """Raised for a manifest row that is not a valid sample; the message names the key and what to do."""


@dataclass(frozen=True, slots=True)
class JsonForm:
    """The form of a JSON value in a target.

    Attributes:
        name: the form, for the documentation.
        read: converts the JSON value, given the value and its key.
        write: converts a value to JSON; the inverse of `read`.
    """

    name: str
    read: Callable[[object, str], Any]
    write: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class TargetField:
    """A key of a target in a manifest.

    Attributes:
        key: the key, which is also the attribute of the target's dataclass.
        form: form of its value.
        meaning: meaning of its value, for the documentation.
        required: whether a row must have the key. If it may be missing, the dataclass has a default; a value of None is
            not written.
    """

    key: str
    form: JsonForm
    meaning: str
    required: bool = True


def text(value: object, key: str) -> str:
    """Read a string that can be encoded as UTF-8."""
    if not isinstance(value, str):
        raise RowError(f"key {key!r}: expected text, got {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair, which cannot be encoded
        raise RowError(f"key {key!r}: lone surrogate, half a character, at {error.start}; repair the text") from None
    return value


def number(value: object, key: str) -> float:
    """Read a number as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(f"key {key!r}: expected a number, got {shown(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise RowError(f"key {key!r}: the number is too large") from error


def integer(value: object, key: str) -> int:
    """Read a whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise RowError(f"key {key!r}: expected a whole number, got {shown(value)}")
    return value


def items(read: Callable[[object, str], T], value: object, key: str) -> tuple[T, ...]:
    """Read a list; `read` converts each item, given the item and its key."""
    if not isinstance(value, list):
        raise RowError(f"key {key!r}: expected a list, got {shown(value)}")
    return tuple(read(item, f"{key}[{index}]") for index, item in enumerate(value))


def interval(value: object, key: str) -> Interval:
    """Read a span of time, [start_s, end_s]."""
    start_s, end_s = _numbers(value, key, "start_s, end_s")
    try:
        return Interval(start_s, end_s)
    except ValueError as error:
        raise RowError(f"key {key!r}: {error}; correct the annotation") from error


def box(value: object, key: str) -> Box:
    """Read a box, [x0, y0, x1, y1] as fractions of the frame."""
    x0, y0, x1, y1 = _numbers(value, key, "x0, y0, x1, y1")
    try:
        return Box(x0, y0, x1, y1)
    except ValueError as error:
        raise RowError(f"key {key!r}: {error}; divide pixels by the frame's width and height") from error


def shown(value: object) -> str:
    """Return a value as JSON for an error message, shortened to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def list_of(form: JsonForm) -> JsonForm:
    """Return the form of a list whose items have the given form; the target holds a tuple."""
    return JsonForm(
        f"[{form.name}, ...]",
        lambda value, key: items(form.read, value, key),
        lambda values: [form.write(value) for value in values],
    )


def choice_of(names: type[E]) -> JsonForm:
    """Return the form of one of the values of an enumeration."""

    def read(value: object, key: str) -> E:
        if not isinstance(value, str) or value not in list(names):
            raise RowError(f"key {key!r}: {shown(value)} is not one of {', '.join(names)}")
        return names(str(value))

    return JsonForm(" or ".join(f'"{name}"' for name in names), read, str)


def _numbers(value: object, key: str, names: str) -> tuple[float, ...]:
    """Read a list of numbers, one for each of the comma-separated `names`."""
    if not isinstance(value, list) or len(value) != len(names.split(", ")):
        raise RowError(f"key {key!r}: expected [{names}], got {shown(value)}")
    return tuple(number(item, f"{key}[{index}]") for index, item in enumerate(value))


def _unchanged(value: Any) -> Any:
    return value


TEXT = JsonForm("text", text, _unchanged)
NUMBER = JsonForm("number", number, _unchanged)
INTEGER = JsonForm("whole number", integer, _unchanged)
INTERVAL = JsonForm("[start_s, end_s]", interval, lambda span: [span.start_s, span.end_s])
BOX = JsonForm("[x0, y0, x1, y1]", box, lambda box: [box.x0, box.y0, box.x1, box.y1])
