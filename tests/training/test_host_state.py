from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_vcr1.checkpoint.optimizer_state import main_parameters
from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.parallel import mesh
from megatron_vcr1.training.host_state import HostState
from tests.device_tracker import GPU, on_gpu, tracking_devices

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="emulates a GPU")


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with (
        mesh.world(ParallelSection()),
        tracking_devices(),
        mock.patch("torch.cuda.current_device", return_value=GPU),
        # Where torch.distributed puts pickled objects.
        mock.patch("torch.distributed.distributed_c10d._get_object_coll_device", return_value=GPU),
    ):
        yield


def _optimizer(dtype: torch.dtype) -> tuple[nn.Module, ChainedOptimizer]:
    model = nn.Linear(3, 5).to("cuda", dtype)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    settings = OptimizerConfig(optimizer="adam", lr=1e-2, bf16=dtype == torch.bfloat16, params_dtype=dtype)
    return model, get_megatron_optimizer(settings, [wrapped])


def _state(optimizer: ChainedOptimizer) -> list[Tensor]:
    return [
        tensor
        for main in main_parameters(optimizer)
        for tensor in (*main.moments().values(), *((main.values,) if main.is_copy else ()))
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_is_on_the_gpu_during_a_step_only(dtype: torch.dtype) -> None:
    model, optimizer = _optimizer(dtype)
    state = HostState(optimizer)
    before = model.weight.detach().clone()
    for _ in range(2):
        assert not any(map(on_gpu, _state(optimizer)))
        with state.on_device():
            assert all(map(on_gpu, _state(optimizer)))
            for parameter in model.parameters():
                parameter.main_grad.fill_(1.0)
            optimizer.prepare_grads()
            optimizer.step_with_ready_grads()
            optimizer.zero_grad()
    assert len(_state(optimizer)) == (4 if dtype == torch.float32 else 6)
    assert all(map(on_gpu, model.parameters()))
    torch.testing.assert_close(model.weight, before - 0.02, atol=1e-2, rtol=0)
