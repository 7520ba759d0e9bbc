"""The pipeline schedule on a model of one linear layer per stage, against the same layers in a row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor, nn

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.parallel import mesh, schedule
from megatron_vcr1.parallel.megatron_compat import no_cuda_graphs
from tests.gloo import GlooPool

pytestmark = pytest.mark.xdist_group("gloo")

SIZE = 4
LENGTHS = (3, 5, 2)  # microbatches of different lengths


def _microbatches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, 1, SIZE, generator=generator) for length in LENGTHS]


def _weight(stage: int) -> Tensor:
    return torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1 + stage))


class _Stage(MegatronModule):
    """A linear layer. The first stage reads the microbatch, the others what the previous stage sent."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        self.model_type = ModelType.encoder_or_decoder
        self.weight = nn.Parameter(_weight(parallel_state.get_pipeline_model_parallel_rank()))
        self.received: Tensor | None = None

    def set_input_tensor(self, tensors: Any) -> None:
        self.received = tensors[0] if isinstance(tensors, list) else tensors

    def forward(self, microbatch: Tensor) -> Tensor:
        x = microbatch if mesh.is_first_stage() else self.received
        assert x is not None
        return x @ self.weight


def _run_stages(num_stages: int) -> tuple[list[float], list[float], Tensor]:
    mesh.initialize(ParallelSection(pipeline=num_stages))
    config = TransformerConfig(
        num_layers=num_stages,
        hidden_size=SIZE,
        num_attention_heads=1,
        pipeline_model_parallel_size=num_stages,
        pipeline_dtype=torch.float32,
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        batch_p2p_comm=False,
        calculate_per_token_loss=True,
        **no_cuda_graphs(),
    )
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), _Stage(config))
    sums = schedule.forward_only(model, _microbatches(), lambda microbatch, output: output.sum().item())

    # Microbatches that hold more than the model's input: the loss gets all of it.
    microbatches = [(hidden, float(length)) for hidden, length in zip(_microbatches(), LENGTHS, strict=True)]

    def loss(microbatch: tuple[Tensor, float], output: Tensor) -> tuple[Tensor, float]:
        return output.square().sum(), microbatch[1]

    lengths = schedule.forward_backward(model, microbatches, loss, model_input=lambda microbatch: microbatch[0])
    return sums, lengths, model.module.weight.main_grad.clone()


@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_stages_equal_the_layers_in_a_row(gloo_pool: GlooPool, num_stages: int) -> None:
    weights = [_weight(stage).requires_grad_() for stage in range(num_stages)]
    outputs = []
    for x in _microbatches():
        for weight in weights:
            x = x @ weight
        outputs.append(x)
    gradients = torch.autograd.grad(sum(output.square().sum() for output in outputs), weights)  # the sum, not the mean
    for rank, (sums, lengths, gradient) in enumerate(gloo_pool.run(_run_stages, num_stages)):
        stage = rank // (4 // num_stages)  # megatron-core's order: data-parallel ranks are neighbours
        torch.testing.assert_close(gradient, gradients[stage], rtol=1e-4, atol=1e-4)
        if stage == num_stages - 1:
            torch.testing.assert_close(sums, [output.sum().item() for output in outputs], rtol=1e-4, atol=1e-4)
            assert lengths == list(LENGTHS)
        else:
            assert sums == lengths == []
