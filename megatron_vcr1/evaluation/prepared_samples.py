"""The function that decoding processes call for each sample.

These processes import this module, so it does not import megatron-core.
"""

from __future__ import annotations

from megatron_vcr1.data.loader import PrepareFn
from megatron_vcr1.data.prompts import PreparedSample
from megatron_vcr1.evaluation.predictions import Prediction
from megatron_vcr1.types import VideoSample


def prepare_or_explain(sample: VideoSample, prepare: PrepareFn) -> PreparedSample | Prediction:
    """Return the prepared sample, or a prediction without output that states why the sample cannot be prepared."""
    try:
        return prepare(sample)
    except ValueError as error:  # VideoError and PromptTooLongError are ValueErrors too
        return Prediction(sample.id, None, str(error))
