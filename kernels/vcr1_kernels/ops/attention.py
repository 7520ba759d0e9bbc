"""Attention over a packed sequence whose segments may share a prefix, for example one prompt and its G responses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vcr1_kernels import reference
from vcr1_kernels.backend import use_triton
from vcr1_kernels.checks import require_contiguous_last_dim, require_floating, require_shape
from vcr1_kernels.layout import QuerySpan, SegmentLayout
from vcr1_kernels.ops.flash_attn import flash_attention, use_flash_attn


def shared_prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, *, scale: float | None = None
) -> Tensor:
    """Compute softmax attention in which each segment attends to itself and to its prefix segment.

    out = softmax(scale * Q K^T + mask) V, where the mask follows from the layout. The result and its gradient equal
    those of G separate sequences prompt + response, but the prompt is computed once: its keys and values are neither
    copied nor recomputed for the segments that share it.

    Args:
        query: [queries, num_heads, head_dim]; the last dimension is contiguous, the other strides are arbitrary. Every
            token has a query, unless the layout lists the ranges of tokens that have one.
        key: [tokens, num_kv_heads, head_dim]; num_heads is a multiple of num_kv_heads (grouped-query attention).
        value: [tokens, num_kv_heads, head_dim].
        layout: the segments of the tokens.
        scale: positive factor of query @ key. None: head_dim ** -0.5.

    Returns:
        [queries, num_heads, head_dim] in query's dtype.

    Raises:
        ValueError: shapes, dtypes or the layout's numbers of tokens and queries do not fit together, or the scale is
            not positive.
    """
    _check(query, key, value, layout)
    layout = layout.merged
    scale = _positive_scale(scale, query)
    if query.numel() and use_flash_attn(query, layout):
        return flash_attention(query, key, value, layout, scale)
    return _Attention.apply(query, key, value, layout, scale)


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `shared_prefix_attention` without autograd, for callers that write the backward pass themselves.

    The arguments are those of `shared_prefix_attention`.

    Returns:
        The output, and the log-sum-exp that `attention_backward` needs, whose shape depends on the device.
    """
    _check(query, key, value, layout)
    return _forward(query, key, value, layout.merged, _positive_scale(scale, query))


def attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    layout: SegmentLayout,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of query, key and value.

    Args:
        grad_output: gradient of the output, [queries, num_heads, head_dim].
        query, key, value, layout, scale: the arguments of `attention_forward`.
        output, log_sum_exp: its results.
    """
    scale = _positive_scale(scale, query)
    if query.numel() == 0:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    if use_triton(query):
        from vcr1_kernels.triton_ops.attention import launch_backward

        return launch_backward(grad_output, query, key, value, output, log_sum_exp, layout.merged, scale)
    if query.device.type == "cpu":
        return _backward_by_blocks(grad_output, query, key, value, output, log_sum_exp, layout.merged, scale)
    with torch.enable_grad():
        query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
        output = reference.shared_prefix_attention(query, key, value, layout, scale=scale)
    grad_query, grad_key, grad_value = torch.autograd.grad(output, (query, key, value), grad_output)
    return grad_query, grad_key, grad_value


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, scale: float) -> Tensor:
        output, log_sum_exp = _forward(query, key, value, layout, scale)
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sum_exp = ctx.saved_tensors
        grads = attention_backward(grad_output, query, key, value, output, log_sum_exp, ctx.layout, scale=ctx.scale)
        return *grads, None, None


def _forward(query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, scale: float) -> tuple[Tensor, Tensor]:
    if query.numel() == 0:  # for example on a context-parallel rank that has no tokens
        return torch.empty_like(query), query.new_empty(0)
    if use_triton(query):
        from vcr1_kernels.triton_ops.attention import launch_forward

        return launch_forward(query, key, value, layout, scale)
    if query.device.type == "cpu":
        return _forward_by_blocks(query, key, value, layout, scale)
    # float64, or no triton, on a GPU
    output = reference.shared_prefix_attention(query, key, value, layout, scale=scale)
    return output, output.new_empty(0)


def _positive_scale(scale: float | None, query: Tensor) -> float:
    """Return the factor of the scores. The kernels take the maximum of the scores before they apply it."""
    if scale is None:
        return float(query.shape[-1] ** -0.5)
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}")
    return scale


def _check(query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout) -> None:
    require_shape("query", query, layout.num_queries, "num_heads", "head_dim")
    require_shape("key", key, layout.num_tokens, "num_kv_heads", query.shape[2])
    require_shape("value", value, *key.shape)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_floating(name, tensor)
        require_contiguous_last_dim(name, tensor)
        # Triton does not check the addresses that its descriptors hold.
        if tensor.device != query.device:
            raise ValueError(f"query is on {query.device} but {name} is on {tensor.device}; move them to one device")
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
    """Dense attentions of equal shape that run as one batch."""

    queries: _TokenBatch  # rows of the query tensor
    keys: _TokenBatch
    causal: bool
    is_first: bool  # whether these queries are in no earlier block


@lru_cache(maxsize=64)
def _dense_blocks(layout: SegmentLayout) -> tuple[_DenseBlock, ...]:
    """Decompose the attention of a layout into dense blocks, batched by shape.

    First come the blocks in which runs of queries attend to their own keys: every query is in exactly one of them, and
    if every token has a query, every key too. Then come the blocks that attend to the earlier tokens of their segment,
    if these have no query here, and those that attend to a prefix, with the queries of all segments that share it.
    """
    spans_by_length: dict[int, list[QuerySpan]] = defaultdict(list)
    earlier: dict[tuple[int, int], list[Tensor]] = defaultdict(list)  # rows of the queries by their range of keys
    prefixes: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    for span in layout.query_spans:
        spans_by_length[span.length].append(span)
        rows = torch.arange(span.row, span.end_row)
        own_start, prefix = layout.starts[span.segment], layout.prefixes[span.segment]
        if span.start > own_start:
            earlier[own_start, span.start].append(rows)
        if prefix >= 0 and layout.lengths[prefix]:
            prefixes[layout.starts[prefix], layout.starts[prefix + 1]].append(rows)
    blocks = []
    for length, spans in spans_by_length.items():
        queries = _TokenBatch(torch.tensor([span.row for span in spans])[:, None] + torch.arange(length))
        keys = _TokenBatch(torch.tensor([span.start for span in spans])[:, None] + torch.arange(length))
        blocks.append(_DenseBlock(queries, keys, layout.causal, is_first=True))
    # A query may be in a block of both kinds, so the kinds are not batched together.
    return (*blocks, *_batched_by_shape(earlier), *_batched_by_shape(prefixes))


def _batched_by_shape(rows_by_keys: dict[tuple[int, int], list[Tensor]]) -> list[_DenseBlock]:
    """Return the blocks in which queries attend to all keys of a range.

    Args:
        rows_by_keys: for each range of keys, the rows of its queries. A row occurs once.
    """
    pairs_by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for (start, end), rows in rows_by_keys.items():
        queries, keys = torch.cat(rows), torch.arange(start, end)
        pairs_by_shape[len(queries), len(keys)].append((queries, keys))
    blocks = []
    for pairs in pairs_by_shape.values():
        query_batch, key_batch = (_TokenBatch(torch.stack(tokens)) for tokens in zip(*pairs, strict=True))
        blocks.append(_DenseBlock(query_batch, key_batch, causal=False, is_first=False))
    return blocks


def _forward_by_blocks(
    query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Run PyTorch's CPU flash-attention kernel block by block, and merge the blocks by their log-sum-exps.

    The softmax of a query over (prefix, own segment) is the average of the outputs of the two blocks, weighted by
    exp(log-sum-exp).

    Returns:
        The output, and the log-sum-exp, [queries, num_heads].
    """
    accumulate_dtype = torch.promote_types(query.dtype, torch.float32)
    output = torch.empty(query.shape, dtype=accumulate_dtype)
    log_sum_exp = torch.empty(query.shape[:2], dtype=accumulate_dtype)
    blocks = _dense_blocks(layout)
    for block in blocks:
        queries, keys = block.queries, block.keys
        block_output, block_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries.gather(query), keys.gather(key), keys.gather(value), is_causal=block.causal, scale=scale
        )
        if _is_single_block(blocks, layout):
            output, log_sum_exp = _flatten(block_output), _flatten(block_lse)
            break
        if not block.is_first:
            own_lse = queries.gather(log_sum_exp)
            merged_lse = torch.logaddexp(own_lse, block_lse)
            own_weight, block_weight = ((lse - merged_lse).exp()[..., None] for lse in (own_lse, block_lse))
            block_output = queries.gather(output) * own_weight + block_output * block_weight
            block_lse = merged_lse
        queries.write(output, block_output)
        queries.write(log_sum_exp, block_lse)
    return output.to(query.dtype), log_sum_exp


def _backward_by_blocks(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum_exp: Tensor,
    layout: SegmentLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernel block by block, and add the blocks' gradients.

    Given the merged output and the merged log-sum-exp, the kernel returns exactly a block's contribution.
    """
    # Not initialized if every token has a query: the blocks in which segments attend to themselves come first and
    # write every token. The blocks after them add to that.
    has_all_queries = layout.queries is None
    grads = [
        (torch.empty if has_all_queries or tensor is query else torch.zeros)(tensor.shape, dtype=log_sum_exp.dtype)
        for tensor in (query, key, value)
    ]
    blocks = _dense_blocks(layout)
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
            scale=scale,
        )
        if _is_single_block(blocks, layout):
            grads = [_flatten(block_grad) for block_grad in block_grads]
            break
        writes_keys = block.is_first and has_all_queries
        for grad, tokens, block_grad, writes in zip(
            grads, (queries, keys, keys), block_grads, (block.is_first, writes_keys, writes_keys), strict=True
        ):
            (tokens.write if writes else tokens.add)(grad, block_grad)
    grad_query, grad_key, grad_value = (grad.to(query.dtype) for grad in grads)
    return grad_query, grad_key, grad_value


def _is_single_block(blocks: Sequence[_DenseBlock], layout: SegmentLayout) -> bool:
    """Return whether there is one block, which has all tokens in their order, so that there is nothing to scatter."""
    return len(blocks) == 1 and layout.queries is None
