"""Attention over a packed sequence whose segments may share a prefix, for example one prompt and its G responses."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vcr1_kernels import reference
from vcr1_kernels.backend import use_triton
from vcr1_kernels.checks import require_contiguous_last_dim, require_floating, require_shape
from vcr1_kernels.layout import SegmentLayout
from vcr1_kernels.ops.flash_attn import flash_attention, use_flash_attn


def shared_prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, *, scale: float | None = None
) -> Tensor:
    """Compute softmax attention in which each segment attends to itself and to its prefix segment.

    out = softmax(scale * Q K^T + mask) V, where the mask follows from the layout. The result and its gradient equal
    those of G separate sequences prompt + response, but the prompt is computed once: its keys and values are neither
    copied nor recomputed for the segments that share it.

    Args:
        query: [tokens, num_heads, head_dim]; the last dimension is contiguous, the other strides are arbitrary.
        key: [tokens, num_kv_heads, head_dim]; num_heads is a multiple of num_kv_heads (grouped-query attention).
        value: [tokens, num_kv_heads, head_dim].
        layout: the segments of the tokens.
        scale: factor of query @ key. None: head_dim ** -0.5.

    Returns:
        [tokens, num_heads, head_dim] in query's dtype.

    Raises:
        ValueError: shapes, dtypes or the layout's number of tokens do not fit together.
    """
    _check(query, key, value, layout)
    layout = layout.merged
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if query.numel() == 0:
        return query + 0 * (key.sum() + value.sum())  # empty, but with a gradient for all three
    if use_flash_attn(query, layout):
        return flash_attention(query, key, value, layout, scale)
    if use_triton(query):
        return _TritonAttention.apply(query, key, value, layout, scale)
    if query.device.type == "cpu":
        return _BlockwiseAttention.apply(query, key, value, layout, scale)
    return reference.shared_prefix_attention(query, key, value, layout, scale=scale)  # float64, or no triton, on a GPU


def _check(query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout) -> None:
    require_shape("query", query, layout.num_tokens, "num_heads", "head_dim")
    require_shape("key", key, layout.num_tokens, "num_kv_heads", query.shape[2])
    require_shape("value", value, *key.shape)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_floating(name, tensor)
        require_contiguous_last_dim(name, tensor)
        if tensor.dtype != query.dtype:
            raise ValueError(f"query is {query.dtype} but {name} is {tensor.dtype}; cast them to one dtype")
    if query.shape[1] % max(key.shape[1], 1):
        raise ValueError(f"{query.shape[1]} query heads are not a multiple of {key.shape[1]} key-value heads")


@dataclass(frozen=True)
class _TokenBatch:
    """The token indices of a batch of segments of equal length, int64 [batch, length].

    Consecutive indices are read and written as a slice, without copying or indexing.
    """

    index: Tensor

    @cached_property
    def _range(self) -> slice | None:
        """The tokens as a slice, or None if they are not consecutive."""
        flat = self.index.flatten()
        start, stop = int(flat[0]), int(flat[0]) + len(flat)
        return slice(start, stop) if torch.equal(flat, torch.arange(start, stop)) else None

    def gather(self, tensor: Tensor) -> Tensor:
        """Read [batch, heads, length, ...] from [tokens, heads, ...]."""
        segments = tensor[self.index] if self._range is None else tensor[self._range].unflatten(0, self.index.shape)
        return segments.transpose(1, 2)

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Write [batch, heads, length, ...] to these tokens of [tokens, heads, ...]."""
        tensor[self.index.flatten() if self._range is None else self._range] = _flatten(values).to(tensor.dtype)

    def add(self, tensor: Tensor, values: Tensor) -> None:
        """Add [batch, heads, length, ...] to these tokens of [tokens, heads, ...]."""
        if self._range is None:
            tensor.index_add_(0, self.index.flatten(), _flatten(values).to(tensor.dtype))
        else:
            tensor[self._range] += _flatten(values)


def _flatten(values: Tensor) -> Tensor:
    """Reshape [batch, heads, length, ...] to [batch * length, heads, ...]."""
    return values.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class _DenseBlock:
    """Dense attentions of equal shape that run as one batch: of segments to themselves, or to a prefix."""

    queries: _TokenBatch
    keys: _TokenBatch
    causal: bool
    to_prefix: bool


@lru_cache(maxsize=64)
def _dense_blocks(layout: SegmentLayout) -> tuple[_DenseBlock, ...]:
    """Decompose the attention of a layout into dense blocks, batched by shape.

    First come the blocks of segments that attend to themselves: every token is a query and a key of exactly one such
    block. Then come the blocks that attend to a prefix, with the queries of all segments that share it: a token is a
    query of at most one such block.
    """
    starts_by_length: dict[int, list[int]] = defaultdict(list)
    queries_by_prefix: dict[int, list[Tensor]] = defaultdict(list)
    for start, length, prefix in zip(layout.starts, layout.lengths, layout.prefixes, strict=False):
        if length == 0:
            continue
        starts_by_length[length].append(start)
        if prefix >= 0 and layout.lengths[prefix]:
            queries_by_prefix[prefix].append(torch.arange(start, start + length))
    blocks = []
    for length, starts in starts_by_length.items():
        tokens = _TokenBatch(torch.tensor(starts)[:, None] + torch.arange(length))
        blocks.append(_DenseBlock(tokens, tokens, layout.causal, to_prefix=False))
    pairs_by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for prefix, segments in queries_by_prefix.items():
        queries, keys = torch.cat(segments), torch.arange(layout.starts[prefix], layout.starts[prefix + 1])
        pairs_by_shape[queries.numel(), keys.numel()].append((queries, keys))
    for pairs in pairs_by_shape.values():
        query_batch, key_batch = (_TokenBatch(torch.stack(tokens)) for tokens in zip(*pairs, strict=True))
        blocks.append(_DenseBlock(query_batch, key_batch, causal=False, to_prefix=True))
    return tuple(blocks)


class _BlockwiseAttention(torch.autograd.Function):
    """Runs PyTorch's CPU flash-attention kernels block by block and merges the blocks by their log-sum-exps.

    The softmax of a query over (prefix, own segment) is the average of the outputs of the two blocks, weighted by
    exp(log-sum-exp). The flash-attention backward of a block, given the merged output and the merged log-sum-exp,
    returns exactly the block's contribution to the gradients.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, scale: float) -> Tensor:
        accumulate_dtype = torch.promote_types(query.dtype, torch.float32)
        output = torch.empty(query.shape, dtype=accumulate_dtype)
        log_sum_exp = torch.empty(query.shape[:2], dtype=accumulate_dtype)  # [tokens, num_heads]
        blocks = _dense_blocks(layout)
        for block in blocks:
            queries, keys = block.queries, block.keys
            block_output, block_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                queries.gather(query), keys.gather(key), keys.gather(value), is_causal=block.causal, scale=scale
            )
            if len(blocks) == 1:  # the block holds all tokens in their order: nothing to scatter
                output, log_sum_exp = _flatten(block_output), _flatten(block_lse)
                break
            if block.to_prefix:  # the queries' own segments were computed by an earlier block
                own_lse = queries.gather(log_sum_exp)
                merged_lse = torch.logaddexp(own_lse, block_lse)
                own_weight, block_weight = ((lse - merged_lse).exp()[..., None] for lse in (own_lse, block_lse))
                block_output = queries.gather(output) * own_weight + block_output * block_weight
                block_lse = merged_lse
            queries.write(output, block_output)
            queries.write(log_sum_exp, block_lse)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum_exp = ctx.saved_tensors
        # Not initialized: the blocks of segments that attend to themselves come first and write every token. The prefix
        # blocks after them add to that.
        grads = [torch.empty(tensor.shape, dtype=log_sum_exp.dtype) for tensor in (query, key, value)]
        blocks = _dense_blocks(ctx.layout)
        for block in blocks:
            queries, keys = block.queries, block.keys
            block_grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                queries.gather(grad_output),
                queries.gather(query),
                keys.gather(key),
                keys.gather(value),
                queries.gather(output),
                queries.gather(log_sum_exp),
                0.0,  # dropout
                block.causal,
                scale=ctx.scale,
            )
            if len(blocks) == 1:
                grads = [_flatten(block_grad) for block_grad in block_grads]
                break
            for grad, tokens, block_grad in zip(grads, (queries, keys, keys), block_grads, strict=True):
                (tokens.add if block.to_prefix else tokens.write)(grad, block_grad)
        return *(grad.to(query.dtype) for grad in grads), None, None


class _TritonAttention(torch.autograd.Function):
    """Runs the Triton kernels: one in forward, two in backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, scale: float) -> Tensor:
        from vcr1_kernels.triton_ops.attention import launch_forward

        output, log_sum_exp = launch_forward(query, key, value, layout, scale)
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        from vcr1_kernels.triton_ops.attention import launch_backward

        query, key, value, output, log_sum_exp = ctx.saved_tensors
        grads = launch_backward(grad_output, query, key, value, output, log_sum_exp, ctx.layout, ctx.scale)
        return *grads, None, None
