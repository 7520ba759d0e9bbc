"""Context parallelism: what the ranks that share the tokens of a microbatch send each other.

The prompts' tokens are split across the ranks; every response is whole on one rank. In each layer a rank attends from
its own tokens to all tokens of the prompts (`model.context_attention`), so the ranks gather the prompts' keys and
values; in backward, the gradients are reduced and scattered. Responses do not attend to each other, so nothing else
travels between layers. Vision features travel before the first layer (`feature_exchange`).

All ranks of a context-parallel group must call these functions in the same order, and so must their backward passes.
Keys and gradients travel in two process groups of the same ranks (`mesh.context_gradient_group`): a rank that issued
the collectives of the two in another order than the others could wait for them forever. A test compares the orders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_vcr1.parallel import mesh


@dataclass(frozen=True, slots=True)
class OnDevice:
    """A plan for a collective, whose index tensors can be moved to a device."""

    def to(self, device: torch.device) -> Self:
        """Return the plan with its index tensors on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self,
            **{name: x.to(device, non_blocking=True) for name, x in values.items() if isinstance(x, Tensor)},
        )


@dataclass(frozen=True, slots=True)
class KeyGather(OnDevice):
    """The plan by which a rank puts together the keys that its tokens attend to: all prompts, then its own responses.

    Attributes:
        num_prompt_tokens: this rank's tokens of prompts, which are its first ones.
        slots: tokens that every rank contributes; the contribution of a rank with fewer prompt tokens is padded.
        rows: int64 [prompt tokens of all ranks]; the row of each prompt token in the contributions, [ranks * slots].
        own_start: this rank's first token of a response. The tokens between its prompt tokens and this one have a query
            only: their keys come from the ranks that they belong to.
    """

    num_prompt_tokens: int
    slots: int
    rows: Tensor
    own_start: int


Started = Callable[[], Tensor]
"""A collective that is under way; calling it waits for the collective and returns its result."""


def start_gather(local: Tensor, plan: KeyGather) -> Started:
    """Start to gather the keys that this rank's tokens attend to.

    Args:
        local: keys, or keys and values, of this rank's tokens: [tokens, heads, head_dim].

    Returns:
        A function that waits, and returns [prompt tokens of all ranks + own response tokens, heads, head_dim].
    """
    group = parallel_state.get_context_parallel_group()
    contribution = local.new_zeros(plan.slots, *local.shape[1:])
    contribution[: plan.num_prompt_tokens] = local[: plan.num_prompt_tokens]
    contributions = local.new_empty(group.size() * plan.slots, *local.shape[1:])
    work = dist.all_gather_into_tensor(contributions, contribution, group=group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return torch.cat((contributions.index_select(0, plan.rows), local[plan.own_start :]))

    return finish


def start_scatter(grad: Tensor, plan: KeyGather, num_tokens: int) -> Started:
    """Start to sum the gradients of gathered keys over the ranks, and to scatter them to the ranks of their tokens.

    Args:
        grad: gradient of what `start_gather` returns.
        num_tokens: this rank's tokens.

    Returns:
        A function that waits, and returns the gradient of this rank's keys, [tokens, heads, head_dim].
    """
    group = mesh.context_gradient_group()
    num_prompt_tokens = len(plan.rows)
    contributions = grad.new_zeros(group.size() * plan.slots, *grad.shape[1:])
    contributions[plan.rows] = grad[:num_prompt_tokens]  # every row belongs to at most one token
    contribution = grad.new_empty(plan.slots, *grad.shape[1:])
    work = dist.reduce_scatter_tensor(contribution, contributions, group=group, async_op=True)
    grad_local = grad.new_zeros(num_tokens, *grad.shape[1:])
    grad_local[plan.own_start :] = grad[num_prompt_tokens:]

    def finish() -> Tensor:
        work.wait()
        grad_local[: plan.num_prompt_tokens] = contribution[: plan.num_prompt_tokens]
        return grad_local

    return finish


def one_ahead(collectives: Iterable[Started]) -> Iterator[Tensor]:
    """Yield the result of each collective after the next one has been started.

    Args:
        collectives: starts a collective whenever it is asked for the next one.
    """
    current: Started | None = None
    for following in collectives:
        if current is not None:
            yield current()
        current = following
    if current is not None:
        yield current()


def sum_over_context_ranks(values: Tensor) -> Tensor:
    """Return the sum of a tensor over the context-parallel ranks, on all of them."""
    total = values.clone()
    dist.all_reduce(total, group=parallel_state.get_context_parallel_group())
    return total
