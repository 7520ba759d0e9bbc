"""Bitwise comparison of tensors gathered from a sharded model with the safetensors file that it was loaded from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_vcr1.checkpoint.hf_stream import stream_hf_tensors
from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import hf_shapes, model_layout, published_name
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh
from tests.gloo import GlooPool
from tests.model import tiny

pytestmark = pytest.mark.xdist_group("gloo")

LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"tensor": 2},
    {"pipeline": 2},
    {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
    {"tensor": 4, "vision": "data"},
)


def _stream(folder: Path, parallel: dict[str, Any], dtype: str) -> dict[str, Tensor]:
    """Iterate, double the weights, iterate again and compare; returns the tensors of the first iteration."""
    run = RunConfig.model_validate({"model": {"path": folder, "dtype": dtype}, "parallel": parallel})
    mesh.initialize(run.parallel)
    model = build_model(ModelConfig.from_pretrained(folder), run.model, run.parallel, run.recompute)
    load_model_weights(model, folder)
    stream = stream_hf_tensors(model)
    first = {name: tensor.clone() for name, tensor in stream}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    second = dict(stream)
    assert list(second) == list(first)
    assert all(torch.equal(second[name], tensor * 2) for name, tensor in first.items())
    return first


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_layout_yields_the_published_tensors(tmp_path: Path, gloo_pool: GlooPool, family: str) -> None:
    tiny.create(family, tmp_path)
    published = hf_shapes(model_layout(ModelConfig.from_pretrained(tmp_path)))
    stored = load_file(tmp_path / "model.safetensors")
    expected = {published_name(name, published): tensor for name, tensor in stored.items()}
    assert ("lm_head.weight" in expected) == (
        family in ("qwen2_5_vl", "qwen3_vl_moe")
    )  # the others tie it to the embedding
    for parallel in LAYOUTS:
        for found in gloo_pool.run(_stream, tmp_path, parallel, "float32"):
            assert found.keys() == expected.keys(), parallel
            for name, tensor in expected.items():
                assert torch.equal(found[name], tensor), (parallel, name)


def test_tensors_have_the_dtype_of_the_parameters(tmp_path: Path, gloo_pool: GlooPool) -> None:
    tiny.create("qwen2_5_vl", tmp_path)
    for found in gloo_pool.run(_stream, tmp_path, {"tensor": 2, "pipeline": 2}, "bfloat16"):
        assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
