"""Attention under context parallelism, with communication that overlaps with computation.

The ranks gather the keys and values of the prompts, and attend to them from their own tokens. Heads are independent, so
the key-value heads are computed in chunks. While one chunk is computed, the keys and values of the next one are
gathered, and the gradients of the previous one are reduced and scattered:

    forward:     gather 1                gather 2, attend 1      gather 3, attend 2      ...
    backward:    gather 1                gather 2, backward 1    gather 3, backward 2, scatter 1    ...    scatter n

Only the first gather and the last reduce-scatter are exposed. No sum changes its order, so the results are those of a
single gather. A rank with one key-value head has one chunk, so all of its communication is exposed; it takes as long as
the exposed part of a rank with up to four heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from vcr1_kernels import SegmentLayout, attention_backward, attention_forward

from megatron_vcr1.model.key_chunks import MAX_CHUNKS
from megatron_vcr1.parallel.context import KeyGather, Started, one_ahead, start_gather, start_scatter


def attend_across_ranks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SegmentLayout,
    plan: KeyGather,
    *,
    scale: float | None,
    keeps_gathered: bool,
) -> Tensor:
    """Attend from this rank's tokens to the prompts of all context-parallel ranks and to its own responses.

    All ranks of the group must call it in the same order, and so must their backward passes.

    Args:
        query: [tokens, num_heads, head_dim], of this rank's tokens.
        key, value: [tokens, num_kv_heads, head_dim].
        layout: segments of the gathered keys, with the ranges that have a query on this rank.
        plan: how the keys are gathered.
        scale: factor of query @ key. None: head_dim ** -0.5.
        keeps_gathered: whether the gathered keys stay in memory until the backward pass. Otherwise they are gathered
            once more in it. Without recomputation they would be kept for all layers, as many as without context
            parallelism.

    Returns:
        [tokens, num_heads, head_dim].
    """
    return _AttentionAcrossRanks.apply(query, key, value, layout, plan, scale, keeps_gathered)


def forward_across_ranks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SegmentLayout,
    plan: KeyGather,
    *,
    scale: float | None,
    kept: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Compute `attend_across_ranks` without autograd.

    Args:
        kept: receives the gathered keys and values of every chunk, [gathered tokens, 2 * heads of the chunk, head_dim].

    Returns:
        The output, and the log-sum-exp of every chunk.
    """
    results = []
    for part, gathered in zip(_split(query, key), _gather(key, value, plan), strict=True):
        keys, values = gathered.chunk(2, dim=1)
        results.append(attention_forward(part, keys, values, layout, scale=scale))
        if kept is not None:
            kept.append(gathered)
    outputs, log_sum_exps = zip(*results, strict=True)
    return _join(outputs), list(log_sum_exps)


class _AttentionAcrossRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: SegmentLayout,
        plan: KeyGather,
        scale: float | None,
        keeps_gathered: bool,
    ) -> Tensor:
        kept: list[Tensor] | None = [] if keeps_gathered else None
        output, log_sum_exps = forward_across_ranks(query, key, value, layout, plan, scale=scale, kept=kept)
        ctx.save_for_backward(query, key, value, output, *log_sum_exps, *(kept or ()))
        ctx.layout, ctx.plan, ctx.scale, ctx.num_chunks = layout, plan, scale, len(log_sum_exps)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *saved = ctx.saved_tensors
        log_sum_exps, kept = saved[: ctx.num_chunks], saved[ctx.num_chunks :]
        plan: KeyGather = ctx.plan
        grad_queries: list[Tensor] = []

        def scatters() -> Iterator[Started]:
            """Compute the gradients of one chunk after the other, and start to scatter those of the keys and values."""
            gathers: Iterable[Tensor] = kept or _gather(key, value, plan)
            by_queries = (_split(tensor, key) for tensor in (grad_output, query, output))
            for grad, part, result, lse, gathered in zip(*by_queries, log_sum_exps, gathers, strict=True):
                keys, values = gathered.chunk(2, dim=1)
                grad_query, *grads = attention_backward(
                    grad, part, keys, values, result, lse, ctx.layout, scale=ctx.scale
                )
                grad_queries.append(grad_query)
                scatter = start_scatter(torch.cat(grads, dim=1), plan, len(key))
                del grads  # before the next chunk's attention, which needs the most memory
                yield scatter

        grads_of_chunks = [grads.chunk(2, dim=1) for grads in one_ahead(scatters())]
        grad_key, grad_value = map(_join, zip(*grads_of_chunks, strict=True))
        return _join(grad_queries), grad_key, grad_value, None, None, None, None


def _gather(key: Tensor, value: Tensor, plan: KeyGather) -> Iterator[Tensor]:
    """Yield the gathered keys and values of each chunk; those of the next one are on their way."""
    chunks = zip(key.chunk(MAX_CHUNKS, dim=1), value.chunk(MAX_CHUNKS, dim=1), strict=True)
    return one_ahead(start_gather(torch.cat(parts, dim=1), plan) for parts in chunks)


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Return the heads of all chunks together, [tokens, heads, ...]."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _split(tensor: Tensor, key: Tensor) -> tuple[Tensor, ...]:
    """Return the query heads of each chunk of key-value heads, as views: [tokens, heads of the chunk, ...]."""
    queries_per_key = tensor.shape[1] // key.shape[1]
    return tensor.split([queries_per_key * part.shape[1] for part in key.chunk(MAX_CHUNKS, dim=1)], dim=1)
