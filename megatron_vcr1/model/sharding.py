"""The marks by which megatron-core tells weights that are sharded across tensor-parallel ranks from replicated ones.

The gradient norm counts a weight that is not marked as sharded on one tensor-parallel rank only.
"""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn


def mark_sharded_weights(model: nn.Module) -> None:
    """Mark the weights of the parallel layers as sharded.

    megatron-core's layers do so when they initialize their weights, but here the weights are usually loaded instead.
    """
    for module in model.modules():
        if not isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            continue
        weight: Tensor | None = module.weight
        if weight is not None and not hasattr(weight, "tensor_model_parallel"):
            axis = 1 if isinstance(module, RowParallelLinear) else 0
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=axis, stride=1)


def mark_replicated_weights(module: nn.Module) -> None:
    """Mark the weights of a module as replicated. Parallel layers mark theirs as sharded, even those of one rank."""
    for parameter in module.parameters():
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]


def broadcast_weights(module: nn.Module) -> None:
    """Make the weights of a module equal on all tensor-parallel ranks."""
    group = parallel_state.get_tensor_model_parallel_group()
    for parameter in module.parameters():
        dist.broadcast(parameter.data, dist.get_global_rank(group, 0), group=group)
