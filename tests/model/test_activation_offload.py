from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from megatron_vcr1.config.model_sections import RecomputeSection
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model import activation_offload
from megatron_vcr1.model.activation_offload import offload_layer_inputs
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.packed_batch import pack
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh
from tests.model import tiny

NUM_LAYERS, NUM_MICROBATCHES = 4, 2


class _Block(nn.Module):
    """Recomputed layers and a norm, as in megatron-core's TransformerBlock with full recomputation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(NUM_LAYERS))
        self.final_layernorm = nn.RMSNorm(6)
        self.layer_inputs: list[StorageWeakRef] = []

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            self.layer_inputs.append(StorageWeakRef(hidden.untyped_storage()))
            hidden = checkpoint(lambda x, layer=layer: torch.tanh(layer(x)), hidden, use_reentrant=True)
        return self.final_layernorm(hidden)


def _train(*, offloads: bool) -> tuple[_Block, list[Tensor]]:
    """Run two microbatches forward, then both backward, as a pipeline stage does; return all gradients."""
    torch.manual_seed(0)
    block = _Block()
    if offloads:
        offload_layer_inputs(block)
    inputs = [torch.randn(5 + index, 1, 6, requires_grad=True) for index in range(NUM_MICROBATCHES)]
    losses = [block(2 * hidden).square().sum() for hidden in inputs]
    assert [reference.expired() for reference in block.layer_inputs] == [offloads] * (NUM_LAYERS * NUM_MICROBATCHES)
    for loss in losses:
        loss.backward()
    return block, [tensor.grad for tensor in (*inputs, *block.parameters())]  # type: ignore[misc]


def test_layer_inputs_are_not_kept_and_gradients_do_not_change() -> None:
    _, expected = _train(offloads=False)
    block, gradients = _train(offloads=True)
    assert all(map(torch.equal, gradients, expected))
    with torch.no_grad():
        assert block(torch.ones(2, 1, 6)).shape == (2, 1, 6)


def test_the_models_own_layers_keep_one_tensor_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron-core's blocks must save their layers' inputs through hooks, or nothing would be moved."""
    moved: list[torch.Size] = []
    create = activation_offload._HostTensor

    def recorded(tensor: Tensor, previous: Any) -> Any:
        moved.append(tensor.shape)
        return create(tensor, previous)

    monkeypatch.setattr(activation_offload, "_HostTensor", recorded)
    tiny.create("qwen2_5_vl", tmp_path)
    settings = {"model": {"path": tmp_path, "dtype": "float32"}, "recompute": {"granularity": "full", "offload": True}}
    run = RunConfig.model_validate(settings)
    with mesh.world(run.parallel):
        config = ModelConfig.from_pretrained(tmp_path)
        model = build_model(config, run.model, run.parallel, run.recompute, initialize_weights=True).train()
        batch = pack([Group("a", tiny.prompt("v", seed=0), tiny.responses((3,), seed=0))], config)
        model(batch)
    num_patches = sum(item.grid_thw[0] * item.grid_thw[1] * item.grid_thw[2] for item in batch.vision)
    vision = [torch.Size((num_patches, 1, config.vision.hidden_size))] * config.vision.num_layers
    text = [torch.Size((len(batch.token_ids), 1, config.text.hidden_size))] * config.text.num_layers
    assert moved == vision + text


def test_only_inputs_of_recomputed_layers_can_be_offloaded() -> None:
    assert RecomputeSection(granularity="full", offload=True).offload
    with pytest.raises(ValidationError, match="offload needs granularity = 'full', not 'selective'"):
        RecomputeSection(granularity="selective", offload=True)
