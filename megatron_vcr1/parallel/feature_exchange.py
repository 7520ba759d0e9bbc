"""The exchange of vision features: from the ranks that encode frames to the ranks that have their tokens.

Each rank encodes a share of the temporal steps of a microbatch. The features go to the context-parallel ranks of their
tokens. If the tensor-parallel ranks share the frames as well (`parallel.vision = "data"`), they gather the features of
their tokens afterwards, because all of them have the same tokens.

All ranks that share the frames must call `exchange_features` in the same order, and so must their backward passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vcr1.parallel.context import OnDevice


@dataclass(frozen=True, slots=True)
class FeatureExchange(OnDevice):
    """The plan by which vision features go from the ranks that encode them to the ranks that have their tokens.

    Attributes:
        sent_rows: int64; rows of this rank's features to send, ordered by receiving context-parallel rank.
        sent: number of features that each context-parallel rank receives from this rank.
        received: number of features that this rank receives from each context-parallel rank.
        slots: rows that each tensor-parallel rank contributes to the gather; None if it has no part of the frames of
            its own, so that nothing is gathered.
        order: int64 [features of this rank's tokens]; the row of each token's feature among the received ones, or among
            the gathered ones, [tensor-parallel ranks * slots].
        num_features: vision features of the whole microbatch. Without any, no rank sends anything.
    """

    sent_rows: Tensor
    sent: tuple[int, ...]
    received: tuple[int, ...]
    slots: int | None
    order: Tensor
    num_features: int


def exchange_features(features: Tensor, plan: FeatureExchange) -> Tensor:
    """Send vision features to the ranks that have their tokens; in backward, the gradients go back and are summed.

    The tensor-parallel ranks of a token have equal gradients. Each of them sends back the gradients of the features
    that it has contributed to the gather, so every gradient counts once.

    Args:
        features: [features that this rank has encoded, hidden_size]. If they require a gradient on one rank, they must
            do so on all ranks, also where there are none.

    Returns:
        [vision tokens of this rank, hidden_size], in the order of the tokens.
    """
    rows = features.index_select(0, plan.sent_rows)
    if len(plan.sent) > 1:
        rows = _AllToAll.apply(rows, plan.sent, plan.received)
    if plan.slots is not None:
        padded = torch.nn.functional.pad(rows, (0, 0, 0, plan.slots - len(rows)))
        rows = tensor_parallel.gather_from_sequence_parallel_region(padded, tensor_parallel_output_grad=False)
    return rows.index_select(0, plan.order)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        ctx.sent, ctx.received = sent, received
        return _all_to_all(rows, sent, received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_to_all(grad.contiguous(), ctx.received, ctx.sent), None, None


def _all_to_all(rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    output = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(output, rows, list(received), list(sent), group=parallel_state.get_context_parallel_group())
    return output
