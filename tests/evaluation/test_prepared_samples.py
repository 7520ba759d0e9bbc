from __future__ import annotations

import pytest

from megatron_vcr1.data.video_types import VideoError
from megatron_vcr1.evaluation.predictions import Prediction
from megatron_vcr1.evaluation.prepared_samples import prepare_or_explain
from tests.evaluation.samples import choices


def test_an_unusable_sample_becomes_a_prediction_with_the_reason() -> None:
    (sample,) = choices("a")

    def fail(sample: object) -> None:
        raise VideoError("a.mp4", "no such file")

    assert prepare_or_explain(sample, fail) == Prediction("a", None, "a.mp4: no such file")
    assert prepare_or_explain(sample, lambda sample: sample) is sample


def test_a_programming_error_ends_the_run() -> None:
    (sample,) = choices("a")

    def fail(sample: object) -> None:
        raise ValueError("operands could not be broadcast together")

    with pytest.raises(ValueError, match="broadcast"):
        prepare_or_explain(sample, fail)
