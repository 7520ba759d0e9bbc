"""What a megatron-core optimizer keeps of each parameter, as pieces of global tensors of the parameter's shape.

Keys and shapes are those of megatron-core's fully reshardable format: ``optimizer.state.exp_avg.<weight>`` and so on,
with 32-bit master weights as ``param`` where the model's own are shorter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from torch import Tensor, nn

from megatron_vcr1.checkpoint.pieces import Piece, run_of

_PREFIX = "optimizer.state."
_MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_pieces(
    optimizer: MegatronOptimizer, parameters: Mapping[nn.Parameter, list[Piece]], *, divided: bool
) -> list[Piece]:
    """Pieces of this rank's optimizer state; moments that no step has made yet are made, of zeros.

    Args:
        parameters: see `parameter_pieces`.
        divided: the state that is divided over the copies of the model (the distributed optimizer's), or the state that
            every copy has.
    """
    return [
        piece
        for one in _optimizers(optimizer)
        if isinstance(one, DistributedOptimizer) == divided
        for parameter, start, main in _main_parameters(one)
        for name, values in _state(one.optimizer, parameter, main).items()
        for piece in run_of(parameters[parameter], f"{_PREFIX}{name}.", start, values)
    ]


def num_updates(optimizer: MegatronOptimizer) -> int:
    """Steps that Adam has taken, for its bias correction; 0 on a rank without parameters that learn."""
    return max((int(group.get("step", 0)) for group in _groups(optimizer)), default=0)


def set_num_updates(optimizer: MegatronOptimizer, steps: int) -> None:
    """Have Adam go on as if it had taken so many steps."""
    for group in _groups(optimizer):
        group["step"] = steps


def _groups(optimizer: MegatronOptimizer) -> list[dict[str, Any]]:
    """Parameter groups; TransformerEngine's, Apex's and our Adam count a group's steps in it."""
    return [group for one in _optimizers(optimizer) for group in one.optimizer.param_groups]


def _optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """The single optimizers that have parameters on this rank."""
    single = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [one for one in single if not one.is_stub_optimizer]


def _main_parameters(optimizer: Any) -> Iterator[tuple[nn.Parameter, int, Tensor]]:
    """(parameter, start, main): ``main`` is what the inner optimizer updates, the parameter's values from ``start`` on,
    the parameter itself, a view of it or a copy of higher precision.
    """
    if isinstance(optimizer, DistributedOptimizer):
        for parameter, (group, order) in optimizer.model_param_group_index_map.items():
            owned = optimizer._get_model_param_range_map(parameter)["param"]
            yield parameter, owned.start, optimizer.optimizer.param_groups[group]["params"][order]
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        pairs = zip(
            chain.from_iterable(optimizer.float16_groups),
            chain.from_iterable(optimizer.fp32_from_float16_groups),
            strict=True,
        )
        for parameter, main in pairs:
            yield parameter, 0, main
        for parameter in chain.from_iterable(optimizer.fp32_from_fp32_groups):
            yield parameter, 0, parameter
    else:
        assert isinstance(optimizer, FP32Optimizer), type(optimizer)
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, 0, parameter


def _state(inner: torch.optim.Optimizer, parameter: nn.Parameter, main: Tensor) -> dict[str, Tensor]:
    """The flat tensors that belong to a main parameter."""
    state = inner.state[main]
    for name in _MOMENTS:
        if name not in state:
            state[name] = torch.zeros_like(main, dtype=torch.float32)
    tensors = {name: state[name].view(-1) for name in _MOMENTS}
    if main.dtype != parameter.dtype:
        tensors["param"] = main.detach().view(-1)
    return tensors
