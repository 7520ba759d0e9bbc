"""The synthetic update that all sides compute."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_vcr1.model.flops import Workload
from megatron_vcr1.model.packed_batch import pack
from megatron_vcr1.model.presets import model_config
from megatron_vcr1.throughput.update_case import UpdateCase


def test_the_workload_equals_that_of_the_packed_batch(case: UpdateCase) -> None:
    config = model_config("tiny")
    packed = Workload.of_batch(config, pack(case.groups(config), config))
    assert packed == case.workload(config)
    plain = case.plain_workload(config)
    assert plain.patches == 3 * packed.patches
    assert plain.tokens == plain.targets == 2 * 3 * (150 + 7)


def test_groups_and_advantages_depend_on_the_seed_alone(case: UpdateCase) -> None:
    config = model_config("tiny")
    first, again = case.groups(config), case.groups(config)
    assert all(torch.equal(one.prompt.token_ids, two.prompt.token_ids) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0].prompt.token_ids, first[1].prompt.token_ids)
    advantages = case.advantages()
    assert advantages.mean(1).abs().max() < 1e-6
    assert torch.allclose(advantages.std(1), torch.ones(2))


def test_a_prompt_without_room_for_a_video_is_an_error(case: UpdateCase) -> None:
    with pytest.raises(ValueError, match="at least 128"):
        dataclasses.replace(case, prompt_tokens=100).groups(model_config("tiny"))


def test_a_case_survives_json(case: UpdateCase) -> None:
    assert UpdateCase.from_json(case.to_json()) == case
