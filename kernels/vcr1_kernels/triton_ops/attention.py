"""Launches of the attention kernels, and the tables that tell each program which queries and keys it computes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vcr1_kernels.layout import SegmentLayout
from vcr1_kernels.triton_ops.attention_kernels import forward_kernel, key_gradient_kernel, query_gradient_kernel
from vcr1_kernels.triton_ops.sum_parts import sum_parts

HOPPER_NUM_SMS = 132
"""Streaming multiprocessors of H100 SXM and H200."""


class _Tiles(NamedTuple):
    """Tile sizes of a kernel, in tokens, and its launch options."""

    resident: int  # tokens that a program keeps in registers: queries for the output and dQ, keys for dK and dV
    streamed: int  # tokens of the other side that it reads in one iteration
    num_warps: int
    num_stages: int


def launch_forward(
    query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output, [tokens, num_heads, head_dim], and the base-2 log-sum-exp, float32 [num_heads, tokens]."""
    num_tokens, num_heads, _ = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    log_sum_exp = torch.empty(num_heads, num_tokens, dtype=torch.float32, device=query.device)
    tiles = _query_tiles(query, layout)
    blocks = _query_blocks(layout, tiles.resident, query.device)
    forward_kernel[(num_heads, len(blocks))](
        query,
        key,
        value,
        out,
        log_sum_exp,
        blocks,
        *_strides(query, key, value),
        num_tokens,
        scale * math.log2(math.e),
        BLOCK_QUERIES=tiles.resident,
        BLOCK_KEYS=tiles.streamed,
        **_constants(query, key, layout, tiles),
    )
    return out, log_sum_exp


def launch_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    layout: SegmentLayout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value, contiguous.

    The query-gradient kernel also writes delta, which the key-gradient kernel reads: they run in this order. With
    grouped-query attention, the parts of dK and dV take 8 bytes * tokens * num_heads * head_dim * num_splits until they
    are added.
    """
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_out = grad_out.contiguous()
    delta = torch.empty_like(log_sum_exp)
    scalars = (*_strides(query, key, value), len(query), scale, scale * math.log2(math.e))
    tiles = _query_tiles(query, layout)
    blocks = _query_blocks(layout, tiles.resident, query.device)
    query_gradient_kernel[(query.shape[1], len(blocks))](
        query,
        key,
        value,
        out,
        grad_out,
        log_sum_exp,
        delta,
        grad_query,
        blocks,
        *scalars,
        BLOCK_QUERIES=tiles.resident,
        BLOCK_KEYS=tiles.streamed,
        **_constants(query, key, layout, tiles),
    )
    tiles = _key_tiles(query, layout)
    num_splits = _num_key_splits(query, key, layout, tiles)
    # The part of dK and dV of each query head and split. A single part is the gradient itself.
    num_tokens, num_heads, head_dim = query.shape
    num_parts = num_heads // key.shape[1] * num_splits
    grad_key, grad_value = (
        torch.empty(
            (num_tokens, num_heads * num_splits, head_dim),
            dtype=key.dtype if num_parts == 1 else torch.float32,
            device=query.device,
        )
        for _ in range(2)
    )
    blocks, ranges = _key_blocks(layout, tiles, num_splits, query.device)
    key_gradient_kernel[(query.shape[1], len(blocks))](
        query,
        key,
        value,
        grad_out,
        log_sum_exp,
        delta,
        grad_key,
        grad_value,
        blocks,
        ranges,
        *scalars,
        NUM_SPLITS=num_splits,
        BLOCK_QUERIES=tiles.streamed,
        BLOCK_KEYS=tiles.resident,
        **_constants(query, key, layout, tiles),
    )
    if num_parts > 1:
        grad_key, grad_value = (sum_parts(parts, num_parts, key.dtype) for parts in (grad_key, grad_value))
    return grad_query, grad_key, grad_value


def _query_tiles(query: Tensor, layout: SegmentLayout) -> _Tiles:
    """Return the tiles of the forward and the query-gradient kernel.

    Chosen so that Hopper's registers hold them without spilling (tests/kernels/test_hopper.py). float32 inputs do not
    use the tensor cores and need more registers.
    """
    if query.dtype == torch.float32:
        return _Tiles(64, 64, num_warps=8, num_stages=1)
    if query.shape[2] > 128:
        return _Tiles(64, 32, num_warps=8, num_stages=2)
    large = _Tiles(128, 64, num_warps=8, num_stages=3)
    # Tiles of 128 tokens would be half empty (vision windows), or too few to keep all SMs busy.
    if max(layout.lengths) <= 64 or _num_programs(query, layout, large) < 3 * _num_sms(query.device):
        return _Tiles(64, 32, num_warps=4, num_stages=3)
    return large


def _key_tiles(query: Tensor, layout: SegmentLayout) -> _Tiles:
    """Return the tiles of the key-gradient kernel, which has two accumulators and therefore smaller streamed tiles."""
    if query.dtype == torch.float32:
        return _Tiles(64, 32, num_warps=8, num_stages=1)
    if query.shape[2] > 128:
        return _Tiles(64, 32, num_warps=8, num_stages=2)
    if max(layout.lengths) <= 64:
        # The masks of a head_dim that is not a power of two (80 in the vision tower) leave no registers to prefetch.
        return _Tiles(64, 32, num_warps=4, num_stages=2 if _is_power_of_2(query.shape[2]) else 1)
    return _Tiles(128, 32, num_warps=8, num_stages=3)


def _num_key_splits(query: Tensor, key: Tensor, layout: SegmentLayout, tiles: _Tiles) -> int:
    """Return into how many programs the queries of a key block are split.

    The first keys of a prompt have far more queries than the other keys. With fewer than 4 programs per SM, some SMs
    would be idle while others compute these (kernels/benchmarks/occupancy.py). Layouts without shared heads or without
    a prefix have blocks of similar length, and their gradients are written without a second pass.
    """
    if query.shape[1] == key.shape[1] or not any(prefix >= 0 for prefix in layout.prefixes):
        return 1
    num_programs = _num_programs(query, layout, tiles)
    return 1 if num_programs >= 4 * _num_sms(query.device) else 2


def _num_programs(query: Tensor, layout: SegmentLayout, tiles: _Tiles) -> int:
    return query.shape[1] * sum(triton.cdiv(length, tiles.resident) for length in layout.lengths)


def _is_power_of_2(value: int) -> bool:
    return value == triton.next_power_of_2(value)


@lru_cache
def _num_sms(device: torch.device) -> int:
    """Return the number of streaming multiprocessors of a GPU; for the interpreter, that of H100 SXM and H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else HOPPER_NUM_SMS


def _constants(query: Tensor, key: Tensor, layout: SegmentLayout, tiles: _Tiles) -> dict[str, int | bool | str]:
    """Return the compile-time arguments that all three kernels share."""
    _, num_heads, head_dim = query.shape
    return {
        "NUM_HEADS": num_heads,
        "HEADS_PER_KV_HEAD": num_heads // key.shape[1],
        "HEAD_DIM": head_dim,
        "CAUSAL": layout.causal,
        "BLOCK_DIM": max(triton.next_power_of_2(head_dim), 16),  # tl.dot needs at least 16
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",  # half precision ignores it
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Return the token and head strides of each tensor."""
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:2])


# The tables depend on the layout only. They are cached because every layer of a model uses the same layout.
@lru_cache(maxsize=64)
def _query_blocks(layout: SegmentLayout, block_queries: int, device: torch.device) -> Tensor:
    """Return the table of query blocks, int32 [num_blocks, 5].

    Columns: first query, end of its segment, start of its segment, start and end of its prefix. The blocks with the
    most keys come first: programs start in this order, and the last ones to finish should be short.
    """
    blocks = []
    for segment, prefix in enumerate(layout.prefixes):
        own_start, end = layout.starts[segment], layout.starts[segment + 1]
        prefix_start, prefix_end = (0, 0) if prefix < 0 else layout.starts[prefix : prefix + 2]
        for start in range(own_start, end, block_queries):
            # Keys on the causal diagonal are left out: all blocks have about equally many of them.
            num_keys = prefix_end - prefix_start + (start if layout.causal else end) - own_start
            blocks.append((num_keys, (start, end, own_start, prefix_start, prefix_end)))
    return _table([block for _, block in sorted(blocks, reverse=True)], 5, device)


@lru_cache(maxsize=64)
def _key_blocks(layout: SegmentLayout, tiles: _Tiles, num_splits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the table of key blocks, int32 [num_blocks * num_splits, 6], and of query ranges, int32 [num_ranges, 2].

    Columns of a key block: first key, end of its segment, end of the queries on its causal diagonal, first and end
    index of its query ranges, index of the split. A query range holds queries that attend to all keys of the block: the
    rest of its segment and the segments whose prefix it is in. The queries of a block are divided among `num_splits`
    rows. The rows with the most queries come first.
    """
    # For each segment, the token ranges of the segments that have it as their prefix.
    follower_ranges: list[list[tuple[int, int]]] = [[] for _ in layout.lengths]
    for segment, prefix in enumerate(layout.prefixes):
        if prefix >= 0:
            follower_ranges[prefix].append((layout.starts[segment], layout.starts[segment + 1]))
    rows: list[tuple[int, tuple[int, ...]]] = []
    ranges: list[tuple[int, ...]] = []
    for segment, followers in enumerate(follower_ranges):
        own_start, end = layout.starts[segment], layout.starts[segment + 1]
        for start in range(own_start, end, tiles.resident):
            # The kernel iterates over whole tiles of queries, so the masked part is rounded up to whole tiles.
            diagonal_length = triton.cdiv(tiles.resident, tiles.streamed) * tiles.streamed
            diagonal_end = min(start + diagonal_length, end) if layout.causal else start
            block_ranges = _joined([(diagonal_end if layout.causal else own_start, end), *followers])
            parts = _split(block_ranges, diagonal_end - start, num_splits, tiles.streamed)
            for index, part in enumerate(parts):
                split_diagonal_end = diagonal_end if index == 0 else start  # the first split has the diagonal
                num_queries = split_diagonal_end - start + _num_tokens(part)
                row = (start, end, split_diagonal_end, len(ranges), len(ranges) + len(part), index)
                rows.append((num_queries, row))
                ranges += part
    return _table([row for _, row in sorted(rows, reverse=True)], 6, device), _table(ranges, 2, device)


def _split(
    ranges: list[tuple[int, int]], num_tokens_before: int, num_splits: int, tile: int
) -> list[list[tuple[int, int]]]:
    """Divide ranges into `num_splits` parts of about equal length, cut at whole tiles; the first has tokens already."""
    share = triton.cdiv(num_tokens_before + _num_tokens(ranges), num_splits * tile) * tile
    parts: list[list[tuple[int, int]]] = []
    rest = list(ranges)
    for index in range(num_splits):
        budget = share - num_tokens_before if index == 0 else share
        part: list[tuple[int, int]] = []
        while rest and (budget > 0 or index == num_splits - 1):
            start, end = rest.pop(0)
            cut = end if index == num_splits - 1 else min(end, start + triton.cdiv(budget, tile) * tile)
            part.append((start, cut))
            budget -= cut - start
            if cut < end:
                rest.insert(0, (cut, end))
        parts.append(part)
    return parts


def _num_tokens(ranges: Iterable[tuple[int, int]]) -> int:
    return sum(end - start for start, end in ranges)


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join adjacent ranges and drop empty ones."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if start == end:
            continue
        if joined and joined[-1][1] == start:
            start, _ = joined.pop()
        joined.append((start, end))
    return joined


def _table(rows: list[tuple[int, ...]], num_columns: int, device: torch.device) -> Tensor:
    """Copy a table to the device without waiting for it; int32 [num_rows, num_columns], even if it has no rows."""
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, num_columns).to(device, non_blocking=True)
