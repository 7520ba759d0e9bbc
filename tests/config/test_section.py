from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from megatron_vcr1.config.section import Names, Section, Texts


class _Example(Section):
    names: Names[int] = ()
    texts: Texts = ()
    number: float = 0.0


@pytest.mark.parametrize("value, expected", [("1, 2,3", (1, 2, 3)), ("4", (4,)), ("", ()), ([5, 6], (5, 6))])
def test_names_are_split_at_commas(value, expected):
    assert _Example(names=value).names == expected


@pytest.mark.parametrize("value, expected", [("a, b", ("a, b",)), ("", ()), (["a", "b,c"], ("a", "b,c"))])
def test_texts_keep_their_commas(value, expected):
    assert _Example(texts=value).texts == expected


@pytest.mark.parametrize("value", [{"texts": [""]}, {"number": math.inf}, {"number": math.nan}, {"unknown": 1}])
def test_empty_texts_infinities_nan_and_unknown_keys_are_refused(value):
    with pytest.raises(ValidationError):
        _Example.model_validate(value)


def test_sections_are_immutable():
    with pytest.raises(ValidationError, match="frozen"):
        _Example().number = 1.0
