"""Tests of the sampling parameters that an engine accepts."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_vcr1.rollout.engine import SamplingParams


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature >= 0"),
        ({"temperature": float("nan")}, "temperature >= 0"),
        ({"temperature": float("inf")}, "temperature >= 0"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"top_p": 1.1}, "0 < top_p <= 1"),
        ({"top_k": -1}, "top_k >= 0"),
        ({"stop": ("</answer>", "")}, "a stop string is empty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty must be above 0"),
    ],
)
def test_invalid_sampling_parameters_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**{"max_new_tokens": 5, **settings})
