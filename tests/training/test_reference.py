from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_vcr1.config.model_sections import ModelSection, ParallelSection, RecomputeSection
from megatron_vcr1.model.presets import model_config
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.training.reference import Reference, order_by_alignment
from tests.gloo import GlooPool

PLACEMENTS = ("host", "resident")


@pytest.fixture
def world() -> Iterator[None]:
    with mesh.world(ParallelSection()):
        yield


def _model(dtype: torch.dtype = torch.float32, *, distributed: bool = False) -> DistributedDataParallel:
    """Wrap a model with sizes of different alignment and a frozen layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 8), nn.Linear(8, 4)).to(mesh.device(), dtype)
    model[2].requires_grad_(False)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
    return DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1), settings, model
    )


def _weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def _train(model: DistributedDataParallel) -> list[Tensor]:
    """Change the trainable parameters and fill the gradient buffers, and return the new weights."""
    with torch.no_grad():
        for parameter in model.params_with_grad:
            parameter += 1
    for buffer in model.buffers:
        buffer.grad_data.fill_(7.0)
    return _weights(model)


def _check_weights_while_swapped_in(dtype: torch.dtype, placement: str, *, distributed: bool) -> None:
    model = _model(dtype, distributed=distributed)
    initial = _weights(model)
    reference = Reference(model, placement)  # type: ignore[arg-type]
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    for is_prefetched in (True, False):
        trained = _train(model)
        if is_prefetched:
            reference.prefetch()
        assert all(map(torch.equal, _weights(model), trained))
        with reference.swapped_in():
            assert all(map(torch.equal, _weights(model), initial))
        assert all(map(torch.equal, _weights(model), trained))
        # The optimizer, and megatron-core's parameter buffer, write to the policy's memory.
        assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_model_has_the_reference_weights_only_while_swapped_in(world: None, placement: str, dtype: torch.dtype) -> None:
    _check_weights_while_swapped_in(dtype, placement, distributed=False)


def _check_distributed(placement: str) -> None:
    mesh.initialize(ParallelSection())
    for dtype in (torch.float32, torch.bfloat16):
        _check_weights_while_swapped_in(dtype, placement, distributed=True)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_parameters_in_a_sharded_buffer_come_back(gloo_pool: GlooPool, placement: str) -> None:
    gloo_pool.run(_check_distributed, placement)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_policy_comes_back_after_an_error(world: None, placement: str) -> None:
    model = _model()
    reference = Reference(model, placement)  # type: ignore[arg-type]
    trained = _train(model)
    with pytest.raises(RuntimeError, match="out of memory"), reference.swapped_in():
        raise RuntimeError("out of memory")
    assert all(map(torch.equal, _weights(model), trained))


def test_gradient_memory_that_is_released_after_the_prefetch_costs_no_weights(world: None) -> None:
    model = _model()
    initial = _weights(model)
    reference = Reference(model, "host")
    _train(model)
    reference.prefetch()
    model.offload_grad_buffers(synchronize=False)
    reference.prefetch()  # does nothing
    model.restore_grad_buffers(synchronize=False)
    with reference.swapped_in():
        assert all(map(torch.equal, _weights(model), initial))


@dataclass
class _Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of the tensors that operators create in memory of their own."""

    num_bytes: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor)}
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given:
                self.num_bytes += x.untyped_storage().nbytes()
        return result


def test_reference_in_host_memory_needs_no_other_memory(world: None) -> None:
    model = _model(torch.bfloat16)
    with _Allocations() as allocations:
        reference = Reference(model, "host")
    assert allocations.num_bytes == sum(p.nbytes for p in model.params_with_grad)
    (weights,) = reference._weights
    assert weights._host.is_pinned() == torch.cuda.is_available()
    with _Allocations() as allocations:
        reference.prefetch()
        with reference.swapped_in():
            pass
    assert allocations.num_bytes == 0


def test_matrices_of_a_published_model_start_at_aligned_addresses(world: None) -> None:
    """Fast kernels load 16 bytes at a time; biases of an odd size come last."""
    settings = ModelSection.model_validate({"path": "model", "dtype": "bfloat16"})
    with torch.device("meta"):
        model = build_model(model_config("qwen2.5-vl-3b"), settings, ParallelSection(), RecomputeSection())
    start = 0
    for parameter in order_by_alignment(list(model.parameters())):
        assert start % 128 == 0 or parameter.ndim == 1
        start += parameter.nbytes
