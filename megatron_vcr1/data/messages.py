"""Chat messages as users write them: their form, and the checks that they have it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
"""`{"role": str, "content": str | list of parts}`; a part is `{"type": "text" | "image" | "video", <type>: ...}`."""

VIDEO_OPTIONS: dict[str, type] = {
    **{"fps": float, "min_frames": int, "max_frames": int, "total_pixels": int, "min_pixels": int, "max_pixels": int},
    **{"start_s": float, "end_s": float, "image_fps": float},
}
"""Options of a video part, which are those of `read_frames`, and their types."""
IMAGE_OPTIONS: dict[str, type] = {"min_pixels": int, "max_pixels": int}
MAX_DEPTH = 20
"""Deepest nesting of a message's other keys, which chat templates may render, for example of tool calls."""

MAX_OPTION = 2**53


class MessageError(ValueError):
    """Raised for messages that cannot be encoded; the error names the part."""


def checked_parts(messages: Sequence[Message]) -> Iterator[tuple[str, Message]]:
    """Yield every part of a conversation with its place for error messages; a string message is a single text part.

    Raises:
        MessageError: a message or a part is malformed.
    """
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise MessageError(f"{place}: needs the keys 'role' and 'content'")
        if not isinstance(message["role"], str):
            raise MessageError(f"{place}: role is {message['role']!r}; it must be a string")
        for key, value in message.items():
            if key != "content":
                _check_value(value, f"{place}.{key}")
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list | tuple) or not all(isinstance(part, Mapping) for part in parts):
            raise MessageError(f"{place}.content: must be a string or a list of {{'type', ...}} objects")
        for part_index, part in enumerate(parts):
            where = f"{place}.content[{part_index}]"
            _check_part(part, where)
            yield where, part


def check_text(text: str, where: str) -> None:
    """Check that a text can be encoded as UTF-8, which tokenizers do. Half of a surrogate pair cannot.

    Raises:
        MessageError: it cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MessageError(f"{where}: {error.reason} at character {error.start}; remove it") from None


def _check_part(part: Message, where: str) -> None:
    kind = part.get("type")
    if kind not in ("text", "image", "video"):
        raise MessageError(f"{where}: type is {kind!r}; use 'text', 'image' or 'video'")
    if kind not in part:
        raise MessageError(f"{where}: the key {kind!r} is missing")
    value = part[kind]
    if kind == "text":
        if not isinstance(value, str):
            raise MessageError(f"{where}: text is {value!r}; it must be a string")
        check_text(value, where)
        return
    if not (_is_path(value) or (kind == "video" and _are_paths(value))):
        form = "a path or a list of paths" if kind == "video" else "a path"
        raise MessageError(f"{where}: {kind} is {value!r}; it must be {form}")
    _check_options(part, kind, VIDEO_OPTIONS if kind == "video" else IMAGE_OPTIONS, where)


def _check_options(part: Message, kind: str, allowed: Mapping[str, type], where: str) -> None:
    """Check the options of an image or video part. An unknown key is an error: ignoring it would change the input."""
    for key, value in part.items():
        if key in ("type", kind):
            continue
        if key not in allowed:
            raise MessageError(f"{where}: unknown key {key!r}; {kind} parts may have {', '.join(allowed)}")
        numbers = (int,) if allowed[key] is int else (int, float)
        if key == "end_s" and value == math.inf:
            continue
        # NaN compares false, so it is refused too.
        if isinstance(value, bool) or not isinstance(value, numbers) or not abs(value) <= MAX_OPTION:
            raise MessageError(f"{where}: {key} is {value!r}; it must be {_NUMBER_NAMES[allowed[key]]}")


_NUMBER_NAMES = {int: "an integer", float: "a number"}


def _check_value(value: Any, where: str, depth: int = 0) -> None:
    """Check the texts and the nesting of a key that only chat templates read."""
    if depth > MAX_DEPTH:
        raise MessageError(f"{where}: nested too deeply")
    if isinstance(value, str):
        check_text(value, where)
    elif isinstance(value, Mapping):
        for item in value.values():
            _check_value(item, where, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_value(item, where, depth + 1)


def _is_path(value: Any) -> bool:
    return isinstance(value, str | os.PathLike) and bool(os.fspath(value))


def _are_paths(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(map(_is_path, value))
