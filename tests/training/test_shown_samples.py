from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from megatron_vcr1.data.encoding import EncodedPrompt
from megatron_vcr1.data.prompts import PreparedSample
from megatron_vcr1.training.shown_samples import MAX_HEIGHT, film_strip
from tests.evaluation.samples import choices


def _prepared(*frames: torch.Tensor) -> PreparedSample:
    vision = cast(Any, tuple(SimpleNamespace(frames=video) for video in frames))
    return PreparedSample(choices("a")[0], EncodedPrompt(torch.tensor([1]), vision), reduction=None)


def test_strip_has_evenly_spaced_frames_of_limited_height() -> None:
    frames = torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 2 * MAX_HEIGHT, 100, 3)
    strip = film_strip(_prepared(frames))
    assert strip is not None and strip.shape == (MAX_HEIGHT, 4 * 50, 3)
    assert np.unique(strip[0, :, 0]).tolist() == [0, 2, 5, 7]


def test_one_frame_is_shown_alone_and_text_has_no_strip() -> None:
    strip = film_strip(_prepared(torch.zeros(1, 20, 30, 3, dtype=torch.uint8)))
    assert strip is not None and strip.shape == (20, 30, 3)
    assert film_strip(_prepared()) is None
