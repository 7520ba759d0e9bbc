"""The Triton kernels of `vcr1_kernels.ops.attention`: FlashAttention-2 (arXiv:2307.08691) over a segment layout.

A query block belongs to one segment and visits two ranges of keys, its prefix and its own segment. A key block visits
the queries on its causal diagonal and then the ranges of rows that see all of it: the rest of its segment, and the
segments that it is the prefix of. The query heads of its group are summed in registers, so that no gradient needs
atomics and every result is deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_rows(ptr, token_stride, start, end, channels, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[ROWS, channels] from row `start` on; rows >= end and channels >= HEAD_DIM are 0."""
    rows = tl.arange(0, ROWS)
    pointers = ptr + tl.cast(start, tl.int64) * token_stride + rows[:, None] * token_stride + channels[None, :]
    return tl.load(pointers, mask=(rows < end - start)[:, None] & (channels < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store_rows(ptr, token_stride, start, end, channels, values, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    rows = tl.arange(0, ROWS)
    pointers = ptr + tl.cast(start, tl.int64) * token_stride + rows[:, None] * token_stride + channels[None, :]
    mask = (rows < end - start)[:, None] & (channels < HEAD_DIM)[None, :]
    tl.store(pointers, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    accumulator,
    row_max,
    row_sum,
    query,
    query_rows,
    key_ptr,
    value_ptr,
    key_stride,
    value_stride,
    start,
    stop,
    end,
    exp2_scale,
    channels,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax of a query block over the key blocks that begin in [start, stop); keys >= end are hidden."""
    for key_start in range(start, stop, BLOCK_KEYS):
        key = _load_rows(key_ptr, key_stride, key_start, end, channels, BLOCK_KEYS, HEAD_DIM)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * exp2_scale
        if MASKED:
            key_rows = key_start + tl.arange(0, BLOCK_KEYS)
            visible = (key_rows < end)[None, :]
            if CAUSAL:
                visible = visible & (query_rows[:, None] >= key_rows[None, :])
            scores = tl.where(visible, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        rescale = tl.exp2(row_max - new_max)
        p = tl.exp2(scores - new_max[:, None])
        row_sum = row_sum * rescale + tl.sum(p, 1)
        value = _load_rows(value_ptr, value_stride, key_start, end, channels, BLOCK_KEYS, HEAD_DIM)
        accumulator = accumulator * rescale[:, None]
        accumulator = tl.dot(p.to(value.dtype), value, accumulator, input_precision=PRECISION)
        row_max = new_max
    return accumulator, row_max, row_sum


@triton.jit(do_not_specialize=["num_tokens"])
def forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,  # contiguous [tokens, num_heads, head_dim]
    lse_ptr,  # float32 [num_heads, tokens], base 2
    blocks_ptr,  # int32 [num_blocks, 5]
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    num_tokens,
    exp2_scale,
    NUM_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block_ptr = blocks_ptr + tl.program_id(0) * 5
    start, end, own_start = tl.load(block_ptr), tl.load(block_ptr + 1), tl.load(block_ptr + 2)
    prefix_start, prefix_end = tl.load(block_ptr + 3), tl.load(block_ptr + 4)
    head = tl.program_id(1).to(tl.int64)
    key_ptr += head // GROUP_SIZE * key_head_stride
    value_ptr += head // GROUP_SIZE * value_head_stride

    channels = tl.arange(0, BLOCK_DIM)
    query_rows = start + tl.arange(0, BLOCK_QUERIES)
    query = _load_rows(
        query_ptr + head * query_head_stride, query_stride, start, end, channels, BLOCK_QUERIES, HEAD_DIM
    )
    accumulator = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], tl.float32)
    row_max = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_QUERIES], tl.float32)

    # Whole blocks need no mask; each range ends in a masked part. Every row sees a key of the first block it visits.
    prefix_whole = prefix_start + (prefix_end - prefix_start) // BLOCK_KEYS * BLOCK_KEYS
    own_end = tl.minimum(start + BLOCK_QUERIES, end) if CAUSAL else end
    own_whole = own_start + ((start if CAUSAL else end) - own_start) // BLOCK_KEYS * BLOCK_KEYS
    accumulator, row_max, row_sum = _attend(
        accumulator, row_max, row_sum, query, query_rows, key_ptr, value_ptr, key_stride, value_stride,
        prefix_start, prefix_whole, prefix_end, exp2_scale, channels, False, False, BLOCK_KEYS, HEAD_DIM, PRECISION,
    )  # fmt: skip
    accumulator, row_max, row_sum = _attend(
        accumulator, row_max, row_sum, query, query_rows, key_ptr, value_ptr, key_stride, value_stride,
        prefix_whole, prefix_end, prefix_end, exp2_scale, channels, True, False, BLOCK_KEYS, HEAD_DIM, PRECISION,
    )  # fmt: skip
    accumulator, row_max, row_sum = _attend(
        accumulator, row_max, row_sum, query, query_rows, key_ptr, value_ptr, key_stride, value_stride,
        own_start, own_whole, own_end, exp2_scale, channels, False, False, BLOCK_KEYS, HEAD_DIM, PRECISION,
    )  # fmt: skip
    accumulator, row_max, row_sum = _attend(
        accumulator, row_max, row_sum, query, query_rows, key_ptr, value_ptr, key_stride, value_stride,
        own_whole, own_end, own_end, exp2_scale, channels, True, CAUSAL, BLOCK_KEYS, HEAD_DIM, PRECISION,
    )  # fmt: skip

    _store_rows(
        out_ptr + head * HEAD_DIM, NUM_HEADS * HEAD_DIM, start, end, channels, accumulator / row_sum[:, None],
        BLOCK_QUERIES, HEAD_DIM,
    )  # fmt: skip
    tl.store(lse_ptr + head * num_tokens + query_rows, row_max + tl.log2(row_sum), mask=query_rows < end)


@triton.jit
def _accumulate_query_gradient(
    grad_query,
    query,
    grad_out,
    lse,
    delta,
    query_rows,
    key_ptr,
    value_ptr,
    key_stride,
    value_stride,
    start,
    stop,
    end,
    exp2_scale,
    channels,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add dS @ K over the key blocks that begin in [start, stop); keys >= end are hidden."""
    for key_start in range(start, stop, BLOCK_KEYS):
        key = _load_rows(key_ptr, key_stride, key_start, end, channels, BLOCK_KEYS, HEAD_DIM)
        value = _load_rows(value_ptr, value_stride, key_start, end, channels, BLOCK_KEYS, HEAD_DIM)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * exp2_scale
        p = tl.exp2(scores - lse[:, None])
        if MASKED:
            key_rows = key_start + tl.arange(0, BLOCK_KEYS)
            visible = (key_rows < end)[None, :]
            if CAUSAL:
                visible = visible & (query_rows[:, None] >= key_rows[None, :])
            p = tl.where(visible, p, 0.0)
        grad_p = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
        grad_scores = p * (grad_p - delta[:, None])
        grad_query = tl.dot(grad_scores.to(key.dtype), key, grad_query, input_precision=PRECISION)
    return grad_query


@triton.jit(do_not_specialize=["num_tokens"])
def query_gradient_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    grad_out_ptr,  # contiguous, as out, grad_query
    lse_ptr,
    delta_ptr,  # float32 [num_heads, tokens], written here for the key gradient: sum of grad_out * out
    grad_query_ptr,
    blocks_ptr,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    num_tokens,
    scale,
    exp2_scale,
    NUM_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block_ptr = blocks_ptr + tl.program_id(0) * 5
    start, end, own_start = tl.load(block_ptr), tl.load(block_ptr + 1), tl.load(block_ptr + 2)
    prefix_start, prefix_end = tl.load(block_ptr + 3), tl.load(block_ptr + 4)
    head = tl.program_id(1).to(tl.int64)
    key_ptr += head // GROUP_SIZE * key_head_stride
    value_ptr += head // GROUP_SIZE * value_head_stride

    channels = tl.arange(0, BLOCK_DIM)
    query_rows = start + tl.arange(0, BLOCK_QUERIES)
    query = _load_rows(
        query_ptr + head * query_head_stride, query_stride, start, end, channels, BLOCK_QUERIES, HEAD_DIM
    )
    token_stride = NUM_HEADS * HEAD_DIM
    out = _load_rows(out_ptr + head * HEAD_DIM, token_stride, start, end, channels, BLOCK_QUERIES, HEAD_DIM)
    grad_out = _load_rows(grad_out_ptr + head * HEAD_DIM, token_stride, start, end, channels, BLOCK_QUERIES, HEAD_DIM)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    tl.store(delta_ptr + head * num_tokens + query_rows, delta, mask=query_rows < end)
    lse = tl.load(lse_ptr + head * num_tokens + query_rows, mask=query_rows < end, other=0.0)
    grad_query = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], tl.float32)

    prefix_whole = prefix_start + (prefix_end - prefix_start) // BLOCK_KEYS * BLOCK_KEYS
    own_end = tl.minimum(start + BLOCK_QUERIES, end) if CAUSAL else end
    own_whole = own_start + ((start if CAUSAL else end) - own_start) // BLOCK_KEYS * BLOCK_KEYS
    # The rows beyond `end` of a last block have no log-sum-exp, but grad_out and delta 0: what they add is not stored.
    grad_query = _accumulate_query_gradient(
        grad_query, query, grad_out, lse, delta, query_rows, key_ptr, value_ptr, key_stride, value_stride,
        prefix_start, prefix_whole, prefix_end, exp2_scale, channels, False, False, BLOCK_KEYS, HEAD_DIM, PRECISION,
    )  # fmt: skip
    grad_query = _accumulate_query_gradient(
        grad_query, query, grad_out, lse, delta, query_rows, key_ptr, value_ptr, key_stride, value_stride,
        prefix_whole, prefix_end, prefix_end, exp2_scale, channels, True, False, BLOCK_KEYS, HEAD_DIM, PRECISION,
    )  # fmt: skip
    grad_query = _accumulate_query_gradient(
        grad_query, query, grad_out, lse, delta, query_rows, key_ptr, value_ptr, key_stride, value_stride,
        own_start, own_whole, own_end, exp2_scale, channels, False, False, BLOCK_KEYS, HEAD_DIM, PRECISION,
    )  # fmt: skip
    grad_query = _accumulate_query_gradient(
        grad_query, query, grad_out, lse, delta, query_rows, key_ptr, value_ptr, key_stride, value_stride,
        own_whole, own_end, own_end, exp2_scale, channels, True, CAUSAL, BLOCK_KEYS, HEAD_DIM, PRECISION,
    )  # fmt: skip
    _store_rows(
        grad_query_ptr + head * HEAD_DIM,
        token_stride,
        start,
        end,
        channels,
        grad_query * scale,
        BLOCK_QUERIES,
        HEAD_DIM,
    )


@triton.jit
def _accumulate_key_gradients(
    grad_key,
    grad_value,
    key,
    value,
    key_rows,
    query_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    query_stride,
    grad_out_stride,
    start,
    stop,
    end,
    exp2_scale,
    channels,
    CAUSAL: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add dS^T @ Q and P^T @ dO over the query blocks that begin in [start, stop); queries >= end are hidden."""
    for query_start in range(start, stop, BLOCK_QUERIES):
        query_rows = query_start + tl.arange(0, BLOCK_QUERIES)
        query = _load_rows(query_ptr, query_stride, query_start, end, channels, BLOCK_QUERIES, HEAD_DIM)
        grad_out = _load_rows(grad_out_ptr, grad_out_stride, query_start, end, channels, BLOCK_QUERIES, HEAD_DIM)
        lse = tl.load(lse_ptr + query_rows, mask=query_rows < end, other=float("inf"))  # hidden: p is 0
        delta = tl.load(delta_ptr + query_rows, mask=query_rows < end, other=0.0)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * exp2_scale  # [keys, queries]
        p = tl.exp2(scores - lse[None, :])
        if CAUSAL:
            p = tl.where(query_rows[None, :] >= key_rows[:, None], p, 0.0)
        grad_value = tl.dot(p.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION)
        grad_p = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION)
        grad_scores = p * (grad_p - delta[None, :])
        grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit(do_not_specialize=["num_tokens"])
def key_gradient_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_key_ptr,  # contiguous [tokens, num_kv_heads, head_dim], as grad_value
    grad_value_ptr,
    blocks_ptr,  # int32 [num_blocks, 5]
    ranges_ptr,  # int32 [num_ranges, 2]: the query rows that see all of a block
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    num_tokens,
    scale,
    exp2_scale,
    NUM_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block_ptr = blocks_ptr + tl.program_id(0) * 5
    start, end, diagonal_end = tl.load(block_ptr), tl.load(block_ptr + 1), tl.load(block_ptr + 2)
    first_range, last_range = tl.load(block_ptr + 3), tl.load(block_ptr + 4)
    kv_head = tl.program_id(1).to(tl.int64)

    channels = tl.arange(0, BLOCK_DIM)
    key_rows = start + tl.arange(0, BLOCK_KEYS)
    key = _load_rows(key_ptr + kv_head * key_head_stride, key_stride, start, end, channels, BLOCK_KEYS, HEAD_DIM)
    value = _load_rows(
        value_ptr + kv_head * value_head_stride, value_stride, start, end, channels, BLOCK_KEYS, HEAD_DIM
    )
    grad_key = tl.zeros([BLOCK_KEYS, BLOCK_DIM], tl.float32)
    grad_value = tl.zeros([BLOCK_KEYS, BLOCK_DIM], tl.float32)
    token_stride = NUM_HEADS * HEAD_DIM

    for index in range(GROUP_SIZE):
        head = kv_head * GROUP_SIZE + index
        q_ptr = query_ptr + head * query_head_stride
        do_ptr = grad_out_ptr + head * HEAD_DIM
        lse_head_ptr = lse_ptr + head * num_tokens
        delta_head_ptr = delta_ptr + head * num_tokens
        if CAUSAL:
            grad_key, grad_value = _accumulate_key_gradients(
                grad_key, grad_value, key, value, key_rows, q_ptr, do_ptr, lse_head_ptr, delta_head_ptr, query_stride,
                token_stride, start, diagonal_end, end, exp2_scale, channels,
                True, BLOCK_QUERIES, HEAD_DIM, PRECISION,
            )  # fmt: skip
        for range_index in range(first_range, last_range):
            range_start, range_end = tl.load(ranges_ptr + 2 * range_index), tl.load(ranges_ptr + 2 * range_index + 1)
            grad_key, grad_value = _accumulate_key_gradients(
                grad_key, grad_value, key, value, key_rows, q_ptr, do_ptr, lse_head_ptr, delta_head_ptr, query_stride,
                token_stride, range_start, range_end, range_end, exp2_scale, channels,
                False, BLOCK_QUERIES, HEAD_DIM, PRECISION,
            )  # fmt: skip

    grad_token_stride = NUM_HEADS // GROUP_SIZE * HEAD_DIM
    offset = kv_head * HEAD_DIM
    _store_rows(grad_key_ptr + offset, grad_token_stride, start, end, channels, grad_key * scale, BLOCK_KEYS, HEAD_DIM)
    _store_rows(grad_value_ptr + offset, grad_token_stride, start, end, channels, grad_value, BLOCK_KEYS, HEAD_DIM)
