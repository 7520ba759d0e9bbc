from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.video_language_model import VideoLanguageModel, build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.training.microbatches import pack_microbatches
from tests.model import tiny


@pytest.fixture
def model(tmp_path: Path) -> Iterator[VideoLanguageModel]:
    tiny.create("qwen2_5_vl", tmp_path)
    run = RunConfig.model_validate({"model": {"path": tmp_path, "dtype": "float32"}})
    with mesh.world(ParallelSection()):
        yield build_model(
            ModelConfig.from_pretrained(tmp_path), run.model, run.parallel, run.recompute, initialize_weights=True
        )


def _groups() -> list[Group]:
    return [
        Group(f"g{seed}", tiny.prompt("t", seed=seed), tiny.responses((3 + seed, 4), seed=seed)) for seed in range(5)
    ]


def test_microbatches_hold_every_group_once_within_the_budget(model: VideoLanguageModel) -> None:
    groups = _groups()
    max_tokens = 2 * max(group.num_tokens for group in groups)
    microbatches = pack_microbatches(groups, model, max_tokens)
    assert sorted(group.id for members, _ in microbatches for group in members) == [group.id for group in groups]
    assert 1 < len(microbatches) < len(groups)
    for members, packed in microbatches:
        assert sum(group.num_tokens for group in members) <= max_tokens
        responses = [response for group in members for response in group.responses]
        assert torch.equal(packed.target_ids, torch.cat(responses))
        assert packed.response_lengths == tuple(len(response) for response in responses)


def test_groups_over_the_budget_have_microbatches_of_their_own(model: VideoLanguageModel) -> None:
    assert [len(members) for members, _ in pack_microbatches(_groups(), model, max_tokens=1)] == [1] * 5
    assert pack_microbatches([], model, max_tokens=1) == []
