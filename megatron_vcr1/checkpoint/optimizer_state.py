"""The state that a megatron-core optimizer keeps for each parameter, as slices of global tensors.

Each state tensor has the global shape of its parameter. Keys and shapes are those of megatron-core's fully reshardable
format: ``optimizer.state.exp_avg.<weight>``, ``optimizer.state.exp_avg_sq.<weight>``, and
``optimizer.state.param.<weight>`` for float32 master weights, if the model's own are bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
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

from megatron_vcr1.checkpoint.shard_slices import ShardSlice, slices_of_range

_PREFIX = "optimizer.state."
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class MainParameter:
    """A tensor that Adam updates on this rank.

    Attributes:
        inner: the Adam.
        parameter: the model's parameter.
        start: index of the parameter's value (flattened) that is the first of `values`.
        values: the parameter itself, a view of it, or a float32 copy.
    """

    inner: torch.optim.Optimizer
    parameter: nn.Parameter
    start: int
    values: Tensor

    @property
    def is_copy(self) -> bool:
        return self.values.dtype != self.parameter.dtype

    def moments(self) -> dict[str, Tensor]:
        """Return the moments by name. Those that do not exist yet are created, as zeros."""
        state = self.inner.state[self.values]
        dtypes = getattr(self.inner, "moment_dtypes", {})  # TransformerEngine's and Apex's Adam keep them in float32
        for name in _MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(self.values, dtype=dtypes.get(name, torch.float32))
        return {name: state[name] for name in _MOMENTS}


def optimizer_slices(
    optimizer: MegatronOptimizer, parameters: Mapping[nn.Parameter, list[ShardSlice]], *, distributed: bool
) -> list[ShardSlice]:
    """Return the slices of this rank's optimizer state.

    Adam creates its moments in the first step. Moments that do not exist yet are created here, as zeros, so that a
    checkpoint of step 0 is complete and a checkpoint can be loaded before the first step.

    Args:
        optimizer: megatron-core's optimizer of this rank.
        parameters: see `parameter_slices`.
        distributed: True for state that is sharded over data-parallel ranks (of the distributed optimizer), False for
            state that is replicated on all of them.
    """
    return [
        part
        for single in _single_optimizers(optimizer)
        if isinstance(single, DistributedOptimizer) == distributed
        for main in _main_parameters(single)
        for name, values in _flat_state(main).items()
        for part in slices_of_range(parameters[main.parameter], f"{_PREFIX}{name}.", main.start, values)
    ]


def main_parameters(optimizer: MegatronOptimizer) -> list[MainParameter]:
    """Return the tensors that the Adams of this rank update."""
    return [main for single in _single_optimizers(optimizer) for main in _main_parameters(single)]


def num_updates(optimizer: MegatronOptimizer) -> int:
    """Return the number of steps that Adam has taken (for its bias correction); 0 on a rank without trained parameters.

    A skipped step counts for the run but not for Adam, so this is stored besides the run's step.
    """
    return max((int(group.get("step", 0)) for group in _parameter_groups(optimizer)), default=0)


def set_num_updates(optimizer: MegatronOptimizer, steps: int) -> None:
    """Set the number of steps that Adam has taken."""
    for group in _parameter_groups(optimizer):
        group["step"] = steps


def _parameter_groups(optimizer: MegatronOptimizer) -> list[dict[str, Any]]:
    """Return all parameter groups. The Adam of TransformerEngine, Apex and this package counts steps per group."""
    return [group for single in _single_optimizers(optimizer) for group in single.optimizer.param_groups]


def _single_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """Return the optimizers in a chain that have parameters on this rank."""
    singles = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [single for single in singles if not single.is_stub_optimizer]


def _main_parameters(optimizer: Any) -> Iterator[MainParameter]:
    make = partial(MainParameter, optimizer.optimizer)
    if isinstance(optimizer, DistributedOptimizer):
        # Each data-parallel rank owns a flat range of the gradient buffer, and so of some parameters.
        for parameter, (group, order) in optimizer.model_param_group_index_map.items():
            owned = optimizer._get_model_param_range_map(parameter)["param"]
            yield make(parameter, owned.start, optimizer.optimizer.param_groups[group]["params"][order])
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        pairs = zip(
            chain.from_iterable(optimizer.float16_groups),
            chain.from_iterable(optimizer.fp32_from_float16_groups),
            strict=True,
        )
        for parameter, values in pairs:
            yield make(parameter, 0, values)
        for parameter in chain.from_iterable(optimizer.fp32_from_fp32_groups):
            yield make(parameter, 0, parameter)
    else:
        assert isinstance(optimizer, FP32Optimizer), type(optimizer)
        for group in optimizer.optimizer.param_groups:
            for parameter in group["params"]:
                yield make(parameter, 0, parameter)


def _flat_state(main: MainParameter) -> dict[str, Tensor]:
    """Return the state tensors of a main parameter by name, flattened without a copy."""
    tensors = {name: moment.view(-1) for name, moment in main.moments().items()}
    if main.is_copy:
        tensors["param"] = main.values.detach().view(-1)
    return tensors
