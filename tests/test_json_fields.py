"""Keys of JSON objects are read with a check of type and range."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.errors import UserError
from megatron_vcr1.json_fields import Fields


def test_values_and_defaults(tmp_path: Path) -> None:
    content = {"int": 3, "float": 1.5, "list": [1, 2], "yes": True, "text": "a", "null": None, "inner": {"x": 1}}
    (tmp_path / "f.json").write_text(json.dumps(content))
    fields = Fields.from_file(tmp_path / "f.json")
    assert (fields.integer("int"), fields.number("float"), fields.number("int")) == (3, 1.5, 3)
    assert (fields.integers("list"), fields.numbers("list", length=2)) == ((1, 2), (1, 2))
    assert (fields.boolean("yes"), fields.text("text"), fields.section("inner").integer("x")) == (True, "a", 1)
    assert (fields.integer("null", None), fields.number("gone", 2.5), fields.text("gone", None)) == (None, 2.5, None)
    assert ("null" in fields, "gone" in fields, "int" in fields) == (False, False, True)
    assert fields.section("gone").values == {}


@pytest.mark.parametrize(
    "read, value, message",
    [
        (lambda fields: fields.integer("k"), None, "f: lacks 'k'"),
        (lambda fields: fields.integer("k"), True, "f: k is True; it must be an integer from 1 to 16777216"),
        (lambda fields: fields.integer("k", 1), "1", "f: k is '1'; it must be an integer"),
        (lambda fields: fields.number("k"), float("nan"), "f: k is nan; it must be a number above 0"),
        (lambda fields: fields.number("k"), float("inf"), "f: k is inf; it must be a number above 0"),
        (lambda fields: fields.number("k"), 10**400, "f: k is 1000"),
        (lambda fields: fields.boolean("k"), 1, "f: k is 1; it must be true or false"),
        (lambda fields: fields.text("k"), 1, "f: k is 1; it must be a string"),
        (lambda fields: fields.integers("k", length=2), [1], "f: k is [1]; it must be a list of 2 integers"),
        (lambda fields: fields.numbers("k", length=1), 1, "f: k is 1; it must be a list of 1 numbers"),
        (lambda fields: fields.section("k"), [], "f: k: expected a JSON object, got a list"),
    ],
)
def test_a_wrong_value_is_named(read: Callable[[Fields], Any], value: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        read(Fields({"k": value}, "f"))
    assert str(error.value).startswith(message)


def test_long_values_are_abbreviated() -> None:
    with pytest.raises(UserError) as error:
        Fields({"k": ["x" * 10_000] * 10_000}, "f").integer("k")
    assert len(str(error.value)) < 300
