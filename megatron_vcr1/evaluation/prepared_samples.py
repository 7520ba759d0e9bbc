"""The function that decoding processes call for each sample of a benchmark.

These processes import this module, so it does not import megatron-core.
"""

from __future__ import annotations

from megatron_vcr1.data.loader import PrepareFn
from megatron_vcr1.data.prompts import PreparedSample, PromptTooLongError
from megatron_vcr1.data.video_types import VideoError
from megatron_vcr1.evaluation.predictions import Prediction
from megatron_vcr1.types import Sample


def prepare_or_explain(sample: Sample, prepare: PrepareFn) -> PreparedSample | Prediction:
    """Return the prepared sample, or a prediction without output that states why the sample cannot be prepared.

    Only errors that are about the sample are explained. Any other error is a mistake in the code and ends the run.
    """
    try:
        return prepare(sample)
    except (VideoError, PromptTooLongError) as error:
        return Prediction(sample.id, None, str(error))
