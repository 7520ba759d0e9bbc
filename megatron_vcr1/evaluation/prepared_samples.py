"""A benchmark's samples as decoding processes make them, which import this module: it leaves megatron-core alone."""

from __future__ import annotations

from megatron_vcr1.data.loader import Prepare
from megatron_vcr1.data.prompts import PreparedSample
from megatron_vcr1.evaluation.predictions import Prediction
from megatron_vcr1.types import VideoSample


def prepared_or_why_not(sample: VideoSample, prepare: Prepare) -> PreparedSample | Prediction:
    """The prepared sample, or the prediction that says why there is none."""
    try:
        return prepare(sample)
    except ValueError as error:  # a VideoError or PromptTooLongError too
        return Prediction(sample.id, None, str(error))
