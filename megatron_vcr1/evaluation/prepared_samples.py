"""A benchmark's samples as decoding processes make them, which import this module: it leaves megatron-core alone."""

from __future__ import annotations

from collections.abc import Sequence

from torch.utils.data import Dataset

from megatron_vcr1.data.loader import Prepare
from megatron_vcr1.data.prompts import PreparedSample
from megatron_vcr1.evaluation.predictions import Prediction
from megatron_vcr1.types import VideoSample


class PreparedSamples(Dataset[PreparedSample | Prediction]):
    """Index to prepared sample, or to why there is none."""

    def __init__(self, samples: Sequence[VideoSample], prepare: Prepare) -> None:
        self._samples = samples
        self._prepare = prepare

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> PreparedSample | Prediction:
        sample = self._samples[index]
        try:
            return self._prepare(sample)
        except ValueError as error:  # a VideoError or PromptTooLongError too
            return Prediction(sample.id, None, str(error))
