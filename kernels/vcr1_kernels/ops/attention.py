"""Attention over a packed sequence whose segments may share a prefix, e.g. one prompt and its G responses."""

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
    layout = layout.merged
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
class _Rows:
    """Rows of equally long segments, int64 [batch, length]; consecutive ones are read and written without an index."""

    index: Tensor

    @cached_property
    def _range(self) -> slice | None:
        flat = self.index.flatten()
        start, stop = int(flat[0]), int(flat[0]) + len(flat)
        return slice(start, stop) if torch.equal(flat, torch.arange(start, stop)) else None

    def take(self, tensor: Tensor) -> Tensor:
        """[tokens, heads, ...] -> [batch, heads, length, ...]."""
        rows = tensor[self.index] if self._range is None else tensor[self._range].unflatten(0, self.index.shape)
        return rows.transpose(1, 2)

    def put(self, tensor: Tensor, values: Tensor) -> None:
        """Set rows of tensor to what `take` would then give."""
        tensor[self.index.flatten() if self._range is None else self._range] = _flat_rows(values).to(tensor.dtype)

    def add(self, tensor: Tensor, values: Tensor) -> None:
        """Add to rows of tensor, shapes as in `put`."""
        if self._range is None:
            tensor.index_add_(0, self.index.flatten(), _flat_rows(values).to(tensor.dtype))
        else:
            tensor[self._range] += _flat_rows(values)


def _flat_rows(values: Tensor) -> Tensor:
    """[batch, heads, length, ...] -> [batch * length, heads, ...]."""
    return values.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True)
class _Block:
    """Equally shaped dense attentions that run as one batch: of segments on themselves, or on a prefix."""

    queries: _Rows
    keys: _Rows
    causal: bool
    on_prefix: bool


@lru_cache(maxsize=64)
def _dense_blocks(layout: SegmentLayout) -> tuple[_Block, ...]:
    """Decompose a layout: segments on themselves, and for each prefix all of its segments on it, batched by shape.

    Every row is a query and a key of exactly one block of the first kind, and a query of at most one of the second,
    which come last.
    """
    starts_by_length: dict[int, list[int]] = defaultdict(list)
    rows_by_prefix: dict[int, list[Tensor]] = defaultdict(list)
    for start, length, prefix in zip(layout.starts, layout.lengths, layout.prefixes, strict=False):
        if length == 0:
            continue
        starts_by_length[length].append(start)
        if prefix >= 0 and layout.lengths[prefix]:
            rows_by_prefix[prefix].append(torch.arange(start, start + length))
    blocks = []
    for length, starts in starts_by_length.items():
        rows = _Rows(torch.tensor(starts)[:, None] + torch.arange(length))
        blocks.append(_Block(rows, rows, layout.causal, on_prefix=False))
    rows_by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for prefix, row_ranges in rows_by_prefix.items():
        query_rows, key_rows = torch.cat(row_ranges), torch.arange(layout.starts[prefix], layout.starts[prefix + 1])
        rows_by_shape[query_rows.numel(), key_rows.numel()].append((query_rows, key_rows))
    for pairs in rows_by_shape.values():
        queries, keys = (_Rows(torch.stack(rows)) for rows in zip(*pairs, strict=True))
        blocks.append(_Block(queries, keys, causal=False, on_prefix=True))
    return tuple(blocks)


class _BlockwiseAttention(torch.autograd.Function):
    """PyTorch's CPU flash kernels block by block, joined by their log-sum-exps.

    A row's softmax over (prefix, own segment) is the mean of the two blocks' outputs weighted by exp(log-sum-exp), and
    the flash backward kernel, given the joint output and log-sum-exp, returns exactly a block's share of the gradients.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, scale: float) -> Tensor:
        accumulate_dtype = torch.promote_types(query.dtype, torch.float32)
        output = torch.empty(query.shape, dtype=accumulate_dtype)
        log_sum_exp = torch.empty(query.shape[:2], dtype=accumulate_dtype)  # [tokens, num_heads]
        blocks = _dense_blocks(layout)
        for block in blocks:
            rows = block.queries
            block_output, block_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                rows.take(query), block.keys.take(key), block.keys.take(value), is_causal=block.causal, scale=scale
            )
            if len(blocks) == 1:  # of all rows, in their order
                output, log_sum_exp = _flat_rows(block_output), _flat_rows(block_lse)
                break
            if block.on_prefix:
                own_lse = rows.take(log_sum_exp)
                joint_lse = torch.logaddexp(own_lse, block_lse)
                kept, added = ((lse - joint_lse).exp()[..., None] for lse in (own_lse, block_lse))
                block_output, block_lse = rows.take(output) * kept + block_output * added, joint_lse
            rows.put(output, block_output)
            rows.put(log_sum_exp, block_lse)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum_exp = ctx.saved_tensors
        grads = [torch.empty(tensor.shape, dtype=log_sum_exp.dtype) for tensor in (query, key, value)]
        blocks = _dense_blocks(ctx.layout)
        for block in blocks:
            queries, keys = block.queries, block.keys
            block_grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                queries.take(grad_output),
                queries.take(query),
                keys.take(key),
                keys.take(value),
                queries.take(output),
                queries.take(log_sum_exp),
                0.0,
                block.causal,
                scale=ctx.scale,
            )
            if len(blocks) == 1:
                grads = [_flat_rows(block_grad) for block_grad in block_grads]
                break
            for grad, rows, block_grad in zip(grads, (queries, keys, keys), block_grads, strict=True):
                (rows.add if block.on_prefix else rows.put)(grad, block_grad)
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
