"""Launches of the attention kernels, and the tables that tell each program which queries and keys it computes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vcr1_kernels.backend import int32_tensor, on_its_gpu
from vcr1_kernels.layout import QuerySpan, SegmentLayout
from vcr1_kernels.triton_ops import FUSED
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


# Float32 does not use the tensor cores. For each value of a product, Triton keeps a row of the left and a column of the
# right matrix in registers: with head size 64, 128 of the 255 of a thread. In the backward pass, therefore, a thread
# computes one value of the scores, and the kernels have one loop instead of two.
_FLOAT32_TILES = _Tiles(16, 16, num_warps=8, num_stages=1)


@on_its_gpu
def launch_forward(
    query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output, [queries, num_heads, head_dim], and the base-2 log-sum-exp, float32 [num_heads, queries]."""
    num_queries, num_heads, _ = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    # TMA needs rows of whole 16 bytes.
    padded_size = triton.cdiv(num_queries, 4) * 4
    log_sum_exp = torch.empty(num_heads, padded_size, dtype=torch.float32, device=query.device)[:, :num_queries]
    tiles, _ = _query_tiles(query, layout)
    blocks = _query_blocks(layout, tiles.resident, query.device)
    forward_kernel[(num_heads, len(blocks))](
        _descriptor(query, tiles.resident),
        _descriptor(key, tiles.streamed),
        _descriptor(value, tiles.streamed),
        out,
        log_sum_exp,
        log_sum_exp.stride(0),
        blocks,
        scale * math.log2(math.e),
        BLOCK_QUERIES=tiles.resident,
        BLOCK_KEYS=tiles.streamed,
        **_constants(query, key, layout, tiles),
    )
    return out, log_sum_exp


@on_its_gpu
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
    out = out.contiguous()
    if log_sum_exp.stride(0) % 4:  # a copy of what `launch_forward` has returned, without the padding of its rows
        num_queries = len(query)
        log_sum_exp = F.pad(log_sum_exp, (0, -num_queries % 4))[:, :num_queries]
    delta = torch.empty_strided(
        log_sum_exp.shape, log_sum_exp.stride(), dtype=log_sum_exp.dtype, device=log_sum_exp.device
    )
    scalars = (scale, scale * math.log2(math.e))
    _, tiles = _query_tiles(query, layout)
    blocks = _query_blocks(layout, tiles.resident, query.device)
    query_gradient_kernel[(query.shape[1], len(blocks))](
        _descriptor(query, tiles.resident),
        _descriptor(key, tiles.streamed),
        _descriptor(value, tiles.streamed),
        _descriptor(grad_out, tiles.resident),
        out,
        log_sum_exp,
        delta,
        delta.stride(0),
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
    _, num_heads, head_dim = query.shape
    num_parts = num_heads // key.shape[1] * num_splits
    grad_key, grad_value = (
        torch.empty(
            (len(key), num_heads * num_splits, head_dim),
            dtype=key.dtype if num_parts == 1 else torch.float32,
            device=query.device,
        )
        for _ in range(2)
    )
    blocks, ranges = _key_blocks(layout, tiles, num_splits, query.device)
    key_gradient_kernel[(query.shape[1], len(blocks))](
        _descriptor(query, tiles.streamed),
        _descriptor(key, tiles.resident),
        _descriptor(value, tiles.resident),
        _descriptor(grad_out, tiles.streamed),
        TensorDescriptor.from_tensor(log_sum_exp, [1, tiles.streamed]),
        TensorDescriptor.from_tensor(delta, [1, tiles.streamed]),
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


def _query_tiles(query: Tensor, layout: SegmentLayout) -> tuple[_Tiles, _Tiles]:
    """Return the tiles of the forward kernel and of the query-gradient kernel.

    Chosen so that Hopper's registers hold them without spilling (tests/kernels/test_hopper.py). The query-gradient
    kernel has two more tiles in registers, the gradients of P and of the output.
    """
    if query.dtype == torch.float32:
        forward = _FLOAT32_TILES._replace(resident=32, streamed=32) if query.shape[2] <= 64 else _FLOAT32_TILES
        return forward, _FLOAT32_TILES
    if query.shape[2] > 128 or not _fits_large_tiles(query.device):
        return (_Tiles(64, 32, num_warps=8, num_stages=2),) * 2
    large = _Tiles(128, 128, num_warps=8, num_stages=2), _Tiles(128, 64, num_warps=8, num_stages=3)
    # Tiles of 128 tokens would be half empty (vision windows), or too few to keep all SMs busy.
    lengths = layout.lengths if layout.queries is None else [span.length for span in layout.query_spans]
    if max(lengths) <= 64 or _num_programs(query, lengths, large[0]) < 3 * _num_sms(query.device):
        return (_Tiles(64, 64, num_warps=4, num_stages=2),) * 2
    return large


def _key_tiles(query: Tensor, layout: SegmentLayout) -> _Tiles:
    """Return the tiles of the key-gradient kernel."""
    if query.dtype == torch.float32:
        return _FLOAT32_TILES
    if query.shape[2] > 128 or not _fits_large_tiles(query.device):
        return _Tiles(64, 32, num_warps=8, num_stages=2)
    if max(layout.lengths) <= 64:
        return _Tiles(64, 64, num_warps=4, num_stages=2)
    return _Tiles(128, 64, num_warps=8, num_stages=2)


def _num_key_splits(query: Tensor, key: Tensor, layout: SegmentLayout, tiles: _Tiles) -> int:
    """Return into how many programs the queries of a key block are split.

    The first keys of a prompt have far more queries than the other keys. With fewer than 4 programs per SM, some SMs
    would be idle while others compute these (kernels/benchmarks/occupancy.py). Layouts without shared heads or without
    a prefix have blocks of similar length, and their gradients are written without a second pass.
    """
    if query.shape[1] == key.shape[1] or not any(prefix >= 0 for prefix in layout.prefixes):
        return 1
    num_programs = _num_programs(query, layout.lengths, tiles)
    return 1 if num_programs >= 4 * _num_sms(query.device) else 2


def _num_programs(query: Tensor, lengths: Iterable[int], tiles: _Tiles) -> int:
    return query.shape[1] * sum(triton.cdiv(length, tiles.resident) for length in lengths)


@lru_cache
def _fits_large_tiles(device: torch.device) -> bool:
    """Return whether a GPU has a tensor memory accelerator (TMA) and the shared memory of Hopper.

    Without TMA, computing addresses needs many registers. Consumer GPUs of newer generations have TMA and 99 KB.
    """
    if device.type != "cuda":
        return True  # the interpreter
    properties: Any = torch.cuda.get_device_properties(device)  # its type declaration has not all of them
    return properties.major >= 9 and properties.shared_memory_per_block_optin >= 200 * 2**10


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
        "BLOCK_DIM": _block_dim(head_dim),
        "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",  # half precision ignores it
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        **FUSED,
    }


def _descriptor(tensor: Tensor, block_tokens: int) -> TensorDescriptor:
    """Describe [tokens, heads, head_dim] to the tensor memory accelerator (TMA), which loads blocks of a head's tokens.

    TMA needs strides of whole 16 bytes. Tensors with other strides are copied; no published model has such. GPUs before
    Hopper have no TMA: there Triton compiles the loads to ordinary ones.
    """
    head_dim, item_bytes = tensor.shape[2], tensor.element_size()
    if (
        tensor.data_ptr() % 16
        or any(stride * item_bytes % 16 for stride in tensor.stride()[:2])
        or tensor.stride(2) != 1
    ):
        tensor = F.pad(tensor, (0, -head_dim % (16 // item_bytes))).contiguous()[..., :head_dim]
    by_head = tensor.transpose(0, 1)
    return TensorDescriptor(by_head, by_head.shape, by_head.stride(), [1, block_tokens, _block_dim(head_dim)])


def _block_dim(head_dim: int) -> int:
    return max(triton.next_power_of_2(head_dim), 16)  # tl.dot needs at least 16


# The tables depend on the layout only. They are cached because every layer of a model uses the same layout.
@lru_cache(maxsize=64)
def _query_blocks(layout: SegmentLayout, block_queries: int, device: torch.device) -> Tensor:
    """Return the table of query blocks, int32 [num_blocks, 6].

    Columns: first token, end of the tokens that have a query or of their segment, start of their segment, start and end
    of its prefix, first row of the query tensor. The blocks with the most keys come first: programs start in this
    order, and the last ones to finish should be short.
    """
    blocks = []
    for span in layout.query_spans:
        prefix, own_start = layout.prefixes[span.segment], layout.starts[span.segment]
        prefix_start, prefix_end = (0, 0) if prefix < 0 else layout.starts[prefix : prefix + 2]
        for start in range(span.start, span.end, block_queries):
            # Keys on the causal diagonal are left out: all blocks have about equally many of them.
            num_keys = prefix_end - prefix_start + (start if layout.causal else span.end) - own_start
            row = span.row + start - span.start
            blocks.append((num_keys, (start, span.end, own_start, prefix_start, prefix_end, row)))
    return _table([block for _, block in sorted(blocks, reverse=True)], 6, device)


@lru_cache(maxsize=64)
def _key_blocks(layout: SegmentLayout, tiles: _Tiles, num_splits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the table of key blocks, int32 [num_blocks * num_splits, 6], and of query ranges, int32 [num_ranges, 3].

    Columns of a key block: first key, end of its segment, its first range of queries on the causal diagonal, its first
    range of queries that attend to all of its keys, end of its ranges, index of the split. The queries that attend to
    all keys of a block are the rest of its segment and the segments whose prefix it is in. Columns of a range: first
    and end row of the query tensor, and the first query's token minus its row. Where the queries attend to all keys,
    the last one is the number of tokens, with which the causal mask hides nothing. The queries of a block are divided
    among `num_splits` rows; the first one has the diagonal. The rows with the most queries come first.
    """
    own: list[list[QuerySpan]] = [[] for _ in layout.lengths]
    followers: list[list[tuple[int, int]]] = [[] for _ in layout.lengths]  # rows of the segments with this prefix
    for span in layout.query_spans:
        own[span.segment].append(span)
        if layout.prefixes[span.segment] >= 0:
            followers[layout.prefixes[span.segment]].append((span.row, span.end_row))
    rows: list[tuple[int, tuple[int, ...]]] = []
    ranges: list[tuple[int, ...]] = []
    # The kernel iterates over whole tiles of queries, so the masked part is rounded up to whole tiles.
    diagonal_length = triton.cdiv(tiles.resident, tiles.streamed) * tiles.streamed if layout.causal else 0
    for segment, (own_start, end) in enumerate(pairwise(layout.starts)):
        for start in range(own_start, end, tiles.resident):
            diagonal_end = start + diagonal_length if layout.causal else own_start
            diagonal = [
                (*_rows(span, start, diagonal_end), span.start - span.row)
                for span in own[segment]
                if span.end > start and span.start < diagonal_end
            ]
            whole = _joined([*(_rows(span, diagonal_end, end) for span in own[segment]), *followers[segment]])
            num_diagonal = sum(last - first for first, last, _ in diagonal)
            for index, part in enumerate(_split(whole, num_diagonal, num_splits, tiles.streamed)):
                masked = diagonal if index == 0 else []
                bounds = (len(ranges), len(ranges) + len(masked), len(ranges) + len(masked) + len(part))
                num_queries = _num_tokens(part) + (num_diagonal if index == 0 else 0)
                rows.append((num_queries, (start, end, *bounds, index)))
                ranges += [*masked, *((first, last, layout.num_tokens) for first, last in part)]
    return _table([row for _, row in sorted(rows, reverse=True)], 6, device), _table(ranges, 3, device)


def _rows(span: QuerySpan, start: int, end: int) -> tuple[int, int]:
    """Return the first and end row of the queries of a span whose tokens are in [start, end)."""
    first, last = max(span.start, start), min(span.end, end)
    return span.row + first - span.start, span.row + max(last, first) - span.start


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
    """Return a table on the device, int32 [num_rows, num_columns], even if it has no rows."""
    return int32_tensor(rows, device).reshape(-1, num_columns)
