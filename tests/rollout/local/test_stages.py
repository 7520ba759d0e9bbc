"""Tests of generation mode and of the broadcast of sampled tokens; test_engine.py runs the stages at every layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.local.stages import broadcast_from_last_stage, generation_mode
from tests.gloo import GlooPool
from tests.model import tiny

pytestmark = pytest.mark.xdist_group("gloo")


def test_generation_mode_is_undone_after_an_error(tmp_path: Path) -> None:
    tiny.create("qwen2_5_vl", tmp_path)
    config = RunConfig.model_validate({"model": {"path": tmp_path, "dtype": "float32"}})
    with mesh.world(config.parallel):
        model = build_model(ModelConfig.from_pretrained(tmp_path), config.model, config.parallel, config.recompute)
        model.config.sequence_parallel = True  # as with tensor parallelism
        with pytest.raises(RuntimeError, match="in generation"), generation_mode(model):
            assert not (model.training or model.config.sequence_parallel or torch.is_grad_enabled())
            raise RuntimeError("in generation")
        assert model.training and model.config.sequence_parallel and torch.is_grad_enabled()


def _broadcast(parallel: dict[str, int]) -> tuple[int, float]:
    """Return this rank's replica, and what it received when every rank broadcasts its own rank."""
    mesh.initialize(ParallelSection.model_validate(parallel))
    values = torch.tensor([float(mesh.rank())])
    broadcast_from_last_stage(values)
    return parallel_state.get_data_parallel_rank(), values.item()


@pytest.mark.parametrize(
    "parallel, output_ranks",
    [({"tensor": 2, "pipeline": 2}, [2]), ({"tensor": 2}, [0, 2]), ({"pipeline": 2}, [2, 3]), ({}, [0, 1, 2, 3])],
    ids=str,
)
def test_every_rank_gets_the_tokens_of_its_output_rank(
    gloo_pool: GlooPool, parallel: dict[str, int], output_ranks: list[int]
) -> None:
    for replica, received in gloo_pool.run(_broadcast, parallel):
        assert received == output_ranks[replica]
