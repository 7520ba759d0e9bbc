"""Tests of the distribution of responses over waves; test_engine.py runs waves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_vcr1.rollout.engine import GenerationRequest
from megatron_vcr1.rollout.local.wave import WaveEntry, plan_waves
from tests.model import tiny


def test_waves_hold_prompts_of_similar_length_and_split_only_large_groups() -> None:
    lengths_and_sizes = ((10, 2), (50, 7), (40, 2), (60, 2))
    requests = [
        GenerationRequest(str(i), replace(tiny.prompt("", seed=0), token_ids=torch.zeros(length)), size)
        for i, (length, size) in enumerate(lengths_and_sizes)
    ]
    assert plan_waves(requests, 4) == [
        [WaveEntry(3, range(2))],
        [WaveEntry(1, range(4))],
        [WaveEntry(1, range(4, 7))],
        [WaveEntry(2, range(2)), WaveEntry(0, range(2))],
    ]
    assert plan_waves([], 4) == []


@pytest.mark.parametrize("max_batch_responses", [1, 3, 8, 100])
def test_every_response_is_in_exactly_one_wave_within_its_limit(max_batch_responses: int) -> None:
    prompt = tiny.prompt("", seed=0)
    requests = [GenerationRequest(str(size), prompt, size) for size in (1, 8, 3, 5)]
    waves = plan_waves(requests, max_batch_responses)
    assert all(sum(len(entry.responses) for entry in wave) <= max_batch_responses for wave in waves)
    planned = [(entry.request, index) for wave in waves for entry in wave for index in entry.responses]
    assert sorted(planned) == [
        (0, 0),
        *((1, i) for i in range(8)),
        *((2, i) for i in range(3)),
        *((3, i) for i in range(5)),
    ]
