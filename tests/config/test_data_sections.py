from __future__ import annotations

import pytest
from pydantic import ValidationError

from megatron_vcr1.config.data_sections import DataSection, DataSource


def test_min_frames_may_not_exceed_max_frames():
    with pytest.raises(ValidationError, match="min_frames = 10 is above max_frames = 4; lower min_frames"):
        DataSection(min_frames=10, max_frames=4)
    assert DataSection(min_frames=4, max_frames=4).max_frames == 4


@pytest.mark.parametrize("weight", [0, -1, float("inf")])
def test_source_weights_must_be_positive_and_finite(weight):
    with pytest.raises(ValidationError):
        DataSource(manifest="train.jsonl", weight=weight)


def test_a_source_inherits_thinking_and_may_override_it():
    sources = ({"manifest": "a"}, {"manifest": "b", "thinking": True}, {"manifest": "c", "thinking": "false"})
    assert [source.thinking for source in DataSection(sources=sources).sources] == [True, True, False]
    assert [source.thinking for source in DataSection(thinking=False, sources=sources).sources] == [False, True, False]
    assert DataSection(thinking=False, sources=(DataSource(manifest="a"),)).sources[0].thinking is False


def test_inherited_thinking_survives_a_dump():
    section = DataSection(thinking=False, sources=({"manifest": "a"},))
    assert DataSection.model_validate(section.model_dump() | {"thinking": True}).sources[0].thinking is False


def test_an_invalid_default_of_thinking_is_the_only_problem():
    with pytest.raises(ValidationError) as raised:
        DataSection(thinking="maybe", sources=({"manifest": "a"},))
    assert [error["loc"] for error in raised.value.errors()] == [("thinking",)]
