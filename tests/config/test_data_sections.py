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
