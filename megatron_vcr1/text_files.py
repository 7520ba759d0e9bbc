"""Reading JSON, TOML and text files that may be damaged or hostile.

Every file that a user, a download or another program may have written is read through these functions. They refuse,
with an error that names the file:

- what is not a regular file (opening a FIFO would block for ever, a device may never end);
- text that is not UTF-8 (a byte order mark is accepted), or larger than `MAX_BYTES`;
- JSON and TOML that is nested too deeply, or holds a number of more digits than Python converts.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_vcr1.errors import UserError

MAX_BYTES = 2**30
"""Largest text file that is read into memory as a whole. Manifests and rollouts are read line by line instead."""

MAX_TOML_BYTES = 2**20
"""Largest TOML file. Settings are short, and Python's parser is slow."""

# The parser's time grows with the square of the number of a key's parts, a.b.c. Possessive quantifiers (++): this
# search never goes back, so its own time grows with the length of the text only.
_VERY_LONG_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){64}""")

PairsHook = Callable[[list[tuple[str, Any]]], Any]

_BYTE_ORDER_MARK = "\ufeff"

MAX_LINE_CHARACTERS = 2**26
"""Longest line of a file that is read line by line."""


def open_regular(path: str | Path) -> int:
    """Open a regular file for reading and return its file descriptor; never block on a FIFO or a device.

    Raises:
        UserError: the path is not a regular file.
        OSError: the file cannot be opened.
    """
    # O_NONBLOCK: without it, opening a FIFO waits for a writer. It has no effect on regular files.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(f"{path}: not a regular file; name a file")
    return descriptor


def read_bytes(path: str | Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Read a whole regular file.

    Raises:
        UserError: the path is not a regular file, or the file is larger than `max_bytes`.
        OSError: the file cannot be read.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UserError(f"{path}: larger than {max_bytes} bytes, too large for this kind of file; name the right file")
    return content


def read_text(path: str | Path, *, max_bytes: int = MAX_BYTES) -> str:
    """Read a whole UTF-8 text file, with or without a byte order mark.

    Raises:
        UserError: the file is missing, not a regular file, too large or not UTF-8 text.
    """
    try:
        return read_bytes(path, max_bytes=max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_json(path: str | Path, *, max_bytes: int = MAX_BYTES, object_pairs_hook: PairsHook | None = None) -> Any:
    """Decode a whole JSON file.

    Args:
        path: the file.
        max_bytes: largest size that is read.
        object_pairs_hook: builds each object from its keys and values, as for `json.loads`.

    Raises:
        UserError: as `read_text`, or the text is not JSON.
    """
    return parse_json(read_text(path, max_bytes=max_bytes), path, object_pairs_hook)


def read_toml(path: str | Path) -> dict[str, Any]:
    """Decode a whole TOML file.

    Raises:
        UserError: as `read_text`, or the text is not TOML.
    """
    return parse_toml(read_text(path, max_bytes=MAX_TOML_BYTES), path)


def read_lines(path: str | Path, *, errors: str = "strict") -> Iterator[str]:
    """Yield the lines of a UTF-8 text file with their line ends, with or without a byte order mark.

    Every line may begin with the mark, because files may have been concatenated. Only line feeds and carriage returns
    end a line: JSON strings may contain Unicode's line separators. A line longer than `MAX_LINE_CHARACTERS` is cut to
    one more than that, so that it takes no more memory; it is not valid JSON then.

    Args:
        path: the file.
        errors: "strict", or "replace" to go on after bytes that are not UTF-8.

    Raises:
        UserError: the file is missing, not a regular file or not UTF-8 text.
    """
    try:
        with os.fdopen(open_regular(path), encoding="utf-8-sig", errors=errors) as file:
            while line := file.readline(MAX_LINE_CHARACTERS + 1):
                is_cut = not line.endswith("\n") and len(line) > MAX_LINE_CHARACTERS
                line = line.removeprefix(_BYTE_ORDER_MARK)
                yield line + "\n" if is_cut else line
                while is_cut and (rest := file.readline(MAX_LINE_CHARACTERS)):
                    is_cut = not rest.endswith("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def parse_json(text: str | bytes, where: object, object_pairs_hook: PairsHook | None = None) -> Any:
    """Decode a JSON text; `where` names it in errors: a file, or a file and line.

    Raises:
        UserError: the text is not JSON, is nested too deeply, or holds a number with thousands of digits.
    """
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    except UserError:  # a ValueError, too; of the hook
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: not JSON that can be read: nested too deeply") from None
    except ValueError as error:  # an integer of more digits than Python converts; bytes that are not UTF-8
        raise UserError(f"{where}: not JSON that can be read: {error}") from None


def parse_toml(text: str, where: object) -> dict[str, Any]:
    """Decode a TOML text; `where` names it in errors.

    Raises:
        UserError: the text is not TOML, is nested too deeply, or holds a number with thousands of digits.
    """
    if _VERY_LONG_KEY.search(text):
        raise UserError(f"{where}: not TOML that can be read: a key of more than 64 parts")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where}: not valid TOML: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: not TOML that can be read: nested too deeply") from None
    except ValueError as error:  # an integer of more digits than Python converts, an impossible date
        raise UserError(f"{where}: not TOML that can be read: {error}") from None


def require_object(value: Any, where: object) -> dict[str, Any]:
    """Return a decoded JSON value that must be an object.

    Raises:
        UserError: it is a list, a text, a number or null.
    """
    if not isinstance(value, dict):
        kind = {list: "a list", str: "a text", type(None): "null"}.get(type(value), "a number or boolean")
        raise UserError(f"{where}: expected a JSON object, got {kind}")
    return value
