"""Attention over a packed sequence whose segments may share a prefix, e.g. one prompt and its G responses."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vcr1_kernels import reference
from vcr1_kernels.backend import use_triton
from vcr1_kernels.checks import require_contiguous_rows, require_floating, require_shape
from vcr1_kernels.layout import SegmentLayout
from vcr1_kernels.ops.flash_attn import flash_attention, use_flash_attn


def shared_prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, *, scale: float | None = None
) -> Tensor:
    """Softmax attention in which each segment sees itself and its prefix segment.

    The result and its gradient are those of G separate sequences prompt + response, at the cost of one prompt: the
    prefix's keys and values are neither copied nor recomputed for the segments that share it.

    Args:
        query: [tokens, num_heads, head_dim], any strides with a contiguous last dimension.
        key: [tokens, num_kv_heads, head_dim]; num_heads is a multiple of num_kv_heads (grouped-query attention).
        value: [tokens, num_kv_heads, head_dim].
        layout: the segments of `tokens`.
        scale: factor on query @ key; head_dim ** -0.5 if None.

    Returns:
        [tokens, num_heads, head_dim] in query's dtype.

    Raises:
        ValueError: shapes, dtypes or the layout's number of tokens do not fit together.
    """
    _check(query, key, value, layout)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if query.numel() == 0:
        return query + 0 * (key.sum() + value.sum())
    if use_flash_attn(query, layout):
        return flash_attention(query, key, value, layout, scale)
    if use_triton(query):
        return _TritonAttention.apply(query, key, value, layout, scale)
    if query.device.type == "cpu":
        return _BlockwiseAttention.apply(query, key, value, layout, scale)
    return reference.shared_prefix_attention(query, key, value, layout, scale=scale)


def _check(query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout) -> None:
    require_shape("query", query, layout.num_tokens, "num_heads", "head_dim")
    require_shape("key", key, layout.num_tokens, "num_kv_heads", query.shape[2])
    require_shape("value", value, *key.shape)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_floating(name, tensor)
        require_contiguous_rows(name, tensor)
        if tensor.dtype != query.dtype:
            raise ValueError(f"query is {query.dtype} but {name} is {tensor.dtype}; cast them to one dtype")
    if query.shape[1] % max(key.shape[1], 1):
        raise ValueError(f"{query.shape[1]} query heads are not a multiple of {key.shape[1]} key-value heads")


@dataclass(frozen=True)
class _Block:
    """Equally shaped dense attentions that run as one batch."""

    query_rows: Tensor  # int64 [batch, query_length]
    key_rows: Tensor  # int64 [batch, key_length]
    causal: bool


@lru_cache(maxsize=64)
def _dense_blocks(layout: SegmentLayout) -> tuple[_Block, ...]:
    """Decompose a layout: segments on themselves, and for each prefix all of its segments on it, batched by shape.

    Every row is a query of exactly one block of the first kind and of at most one of the second, which come last.
    """
    starts_by_length: dict[int, list[int]] = defaultdict(list)
    rows_by_prefix: dict[int, list[Tensor]] = defaultdict(list)
    for start, length, prefix in _joined_segments(layout):
        if length == 0:
            continue
        starts_by_length[length].append(start)
        if prefix >= 0 and layout.lengths[prefix]:
            rows_by_prefix[prefix].append(torch.arange(start, start + length))
    blocks = []
    for length, starts in starts_by_length.items():
        rows = torch.tensor(starts)[:, None] + torch.arange(length)
        blocks.append(_Block(rows, rows, layout.causal))
    rows_by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for prefix, row_ranges in rows_by_prefix.items():
        query_rows, key_rows = torch.cat(row_ranges), torch.arange(layout.starts[prefix], layout.starts[prefix + 1])
        rows_by_shape[query_rows.numel(), key_rows.numel()].append((query_rows, key_rows))
    for pairs in rows_by_shape.values():
        query_blocks, key_blocks = zip(*pairs, strict=True)
        blocks.append(_Block(torch.stack(query_blocks), torch.stack(key_blocks), False))
    return tuple(blocks)


def _joined_segments(layout: SegmentLayout) -> list[tuple[int, int, int]]:
    """Start, length and prefix of each segment; a causal prefix and the only segment behind it are one sequence."""
    segments = list(zip(layout.starts, layout.lengths, layout.prefixes, strict=False))
    if not layout.causal:
        return segments
    num_users = Counter(layout.prefixes)
    for index in reversed(range(1, len(segments))):
        _, length, prefix = segments[index]
        if prefix == index - 1 and num_users[prefix] == 1:
            prefix_start, prefix_length, _ = segments[prefix]
            segments[prefix : index + 1] = [(prefix_start, prefix_length + length, -1)]
    return segments


def _gather_heads_first(tensor: Tensor, rows: Tensor) -> Tensor:
    """[tokens, heads, ...] -> [batch, heads, length, ...]."""
    return tensor[rows].transpose(1, 2)


class _BlockwiseAttention(torch.autograd.Function):
    """PyTorch's CPU flash kernels block by block, joined by their log-sum-exps.

    A row's softmax over (prefix, own segment) is the mean of the two blocks' outputs weighted by exp(log-sum-exp), and
    the flash backward kernel, given the joint output and log-sum-exp, returns exactly a block's share of the gradients.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, scale: float) -> Tensor:
        accumulate_dtype = torch.promote_types(query.dtype, torch.float32)
        output = torch.zeros(query.shape, dtype=accumulate_dtype)
        log_sum_exp = torch.full(query.shape[:2], -torch.inf, dtype=accumulate_dtype)  # [tokens, num_heads]
        for block in _dense_blocks(layout):
            block_output, block_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _gather_heads_first(query, block.query_rows),
                _gather_heads_first(key, block.key_rows),
                _gather_heads_first(value, block.key_rows),
                is_causal=block.causal,
                scale=scale,
            )
            rows = block.query_rows
            block_output, block_lse = block_output.transpose(1, 2), block_lse.transpose(1, 2)
            joint_lse = torch.logaddexp(log_sum_exp[rows], block_lse)
            kept = (log_sum_exp[rows] - joint_lse).exp()[..., None]
            added = (block_lse - joint_lse).exp()[..., None]
            output[rows] = output[rows] * kept + block_output * added
            log_sum_exp[rows] = joint_lse
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum_exp = ctx.saved_tensors
        grads = [torch.zeros(tensor.shape, dtype=log_sum_exp.dtype) for tensor in (query, key, value)]
        for block in _dense_blocks(ctx.layout):
            block_grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _gather_heads_first(grad_output, block.query_rows),
                _gather_heads_first(query, block.query_rows),
                _gather_heads_first(key, block.key_rows),
                _gather_heads_first(value, block.key_rows),
                _gather_heads_first(output, block.query_rows),
                _gather_heads_first(log_sum_exp, block.query_rows),
                0.0,
                block.causal,
                scale=ctx.scale,
            )
            for grad, rows, block_grad in zip(
                grads, (block.query_rows, block.key_rows, block.key_rows), block_grads, strict=True
            ):
                grad.index_add_(0, rows.flatten(), block_grad.transpose(1, 2).flatten(0, 1).to(grad.dtype))
        return *(grad.to(query.dtype) for grad in grads), None, None


class _TritonAttention(torch.autograd.Function):
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
