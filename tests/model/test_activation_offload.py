from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from megatron_vcr1.config.model_sections import RecomputeSection
from megatron_vcr1.model.activation_offload import offload_layer_inputs

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


def test_only_inputs_of_recomputed_layers_can_be_offloaded() -> None:
    assert RecomputeSection(granularity="full", offload=True).offload
    with pytest.raises(ValidationError, match="offload needs granularity = 'full', not 'selective'"):
        RecomputeSection(granularity="selective", offload=True)
