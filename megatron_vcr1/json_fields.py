"""Reading the keys of a JSON object with a check of each value's type and range."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_vcr1.errors import UserError
from megatron_vcr1.text_files import read_json, require_object

MAX_INTEGER = 2**24
"""Default upper limit of an integer: far above every size of a model, and low enough to compute with."""

_REQUIRED: Any = object()


class Fields:
    """A JSON object whose values are read with their type and range checked.

    The value null means the same as a missing key, as in Hugging Face's files. Every error names the object, the key
    and the value.
    """

    def __init__(self, values: Any, where: object) -> None:
        """Check that a decoded JSON value is an object.

        Args:
            values: the decoded value.
            where: the file, or the file and the key of the object, for error messages.

        Raises:
            UserError: the value is not an object.
        """
        self.values: Mapping[str, Any] = require_object(values, where)
        self.where = str(where)

    @classmethod
    def from_file(cls, path: Path) -> Fields:
        """Read a JSON file that holds an object.

        Raises:
            UserError: the file is missing, is not JSON or does not hold an object.
        """
        return cls(read_json(path), path)

    def __contains__(self, key: str) -> bool:
        """Return whether the key has a value other than null."""
        return self.values.get(key) is not None

    def error(self, key: str, requirement: str) -> UserError:
        """Return the error for a value that does not meet a requirement, such as "must be true or false"."""
        return UserError(f"{self.where}: {key} is {reprlib.repr(self.values.get(key))}; it {requirement}")

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise UserError(f"{self.where}: lacks {key!r}; add it, or take the file from the model's publisher again")
        return default

    def integer(self, key: str, default: Any = _REQUIRED, *, minimum: int = 1, maximum: int = MAX_INTEGER) -> int:
        """Return an integer between two limits, or the default, which may be None."""
        value = self._get(key, default)
        if value is default and default is not _REQUIRED:
            return value
        # `type`, because isinstance accepts true and false as integers.
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.error(key, f"must be an integer from {minimum} to {maximum}")
        return value

    def number(self, key: str, default: Any = _REQUIRED, *, above: float = 0, below: float = math.inf) -> float:
        """Return an integer or a float strictly between two limits, or the default."""
        value = self._get(key, default)
        if value is default and default is not _REQUIRED:
            return value
        if not _is_number(value) or not above < value < below:  # NaN is not between any limits
            raise self.error(
                key, f"must be a number above {above}" + ("" if below == math.inf else f" and below {below}")
            )
        return value

    def boolean(self, key: str, default: bool = False) -> bool:
        """Return true or false, or the default."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> str:
        """Return a string, or the default, which may be None."""
        value = self._get(key, default)
        if value is not default and not isinstance(value, str):
            raise self.error(key, "must be a string")
        return value

    def integers(
        self, key: str, default: Sequence[int] = _REQUIRED, *, length: int | None = None, below: int = MAX_INTEGER
    ) -> tuple[int, ...]:
        """Return a list of non-negative integers, of a given length if there is one, or the default."""
        value = self._get(key, default)
        is_list = isinstance(value, list | tuple) and all(type(item) is int and 0 <= item < below for item in value)
        if not is_list or length not in (None, len(value)):
            count = "" if length is None else f"{length} "
            raise self.error(key, f"must be a list of {count}integers from 0 to {below - 1}")
        return tuple(value)

    def numbers(self, key: str, *, length: int, above: float = -math.inf) -> tuple[float, ...]:
        """Return a list of finite numbers of a given length, all above a limit."""
        value = self._get(key, _REQUIRED)
        is_list = isinstance(value, list) and all(_is_number(item) and above < item for item in value)
        if not is_list or len(value) != length:
            limit = "" if above == -math.inf else f", each above {above}"
            raise self.error(key, f"must be a list of {length} numbers{limit}")
        return tuple(value)

    def section(self, key: str) -> Fields:
        """Return a nested object; an empty one if the key is missing or null."""
        return Fields(self._get(key, {}), f"{self.where}: {key}")


def _is_number(value: Any) -> bool:
    """Return whether a decoded value is a finite number, and not true or false."""
    if type(value) is int:
        return abs(value) < 2**63  # larger integers do not fit into a float or a tensor
    return type(value) is float and math.isfinite(value)
