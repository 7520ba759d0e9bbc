"""The Triton kernels of `vcr1_kernels.ops.attention`: FlashAttention-2 (arXiv:2307.08691) over a segment layout.

    S = scale Q K^T    P = softmax(S + mask)    O = P V    L = log2 sum exp2(S log2(e))    (forward)
    dP = dO V^T    delta = rowsum(dO * O)    dS = P * (dP - delta)                          (backward)
    dQ = scale dS K    dK = scale dS^T Q    dV = P^T dO

Work distribution. A program of the forward kernel and of the query-gradient kernel computes one block of queries of one
head. The block belongs to one segment and visits two ranges of keys: its prefix and its own segment. A program of the
key-gradient kernel computes the part of dK and dV that one query head contributes to one block of keys. It visits the
queries on its causal diagonal, then the ranges of queries that attend to all of the block: the rest of its segment and
the segments whose prefix it is in. If several query heads share a key-value head, these parts are float32 and
`sum_parts` adds them. One program per key-value head would leave most of the GPU idle: there are few of them, and the
first keys of a long prompt have far more queries than the others. With very few heads (tensor parallelism), the queries
of a block are therefore also split between two programs. `vcr1_kernels.triton_ops.attention` builds the tables.

Launch order. The head is the fastest axis of the grid, and the tables list the longest blocks first: the programs of
all heads for the longest block start first, and the programs that finish last are short.

Determinism. Every sum is computed by exactly one program, in registers and in a fixed order. There are no atomics, so
results are bitwise reproducible.

Precision. Tensor cores multiply the inputs' dtype; scores, softmax statistics and accumulators are float32. P and dS
are rounded to the inputs' dtype before the second matmul. The GPU's exponential instruction is base 2:
exp(x) = exp2(x * log2(e)), and the factor log2(e) is folded into the scale.

Lengths are not compile-time constants: the kernels are compiled once for a model, not once for a batch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_tokens(ptr, token_stride, start, end, channels, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Load [BLOCK, channels] from token `start` on; tokens >= end and channels >= HEAD_DIM are 0.

    The offset of the first token is computed in 64 bits: tokens * heads * head_dim can exceed 2^31. Offsets within the
    block fit into 32 bits.
    """
    tokens = tl.arange(0, BLOCK)
    pointers = ptr + tl.cast(start, tl.int64) * token_stride + tokens[:, None] * token_stride + channels[None, :]
    return tl.load(pointers, mask=(tokens < end - start)[:, None] & (channels < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store_tokens(ptr, token_stride, start, end, channels, values, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Store [BLOCK, channels] from token `start` on, in the pointer's dtype; the mask is that of `_load_tokens`."""
    tokens = tl.arange(0, BLOCK)
    pointers = ptr + tl.cast(start, tl.int64) * token_stride + tokens[:, None] * token_stride + channels[None, :]
    mask = (tokens < end - start)[:, None] & (channels < HEAD_DIM)[None, :]
    tl.store(pointers, values.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_query_block(blocks_ptr):
    """Return this program's query block: first token, end of its tokens, start of their segment, prefix, first row."""
    block_ptr = blocks_ptr + tl.program_id(1) * 6
    start, end, own_start = tl.load(block_ptr), tl.load(block_ptr + 1), tl.load(block_ptr + 2)
    prefix_start, prefix_end = tl.load(block_ptr + 3), tl.load(block_ptr + 4)
    return start, end, own_start, prefix_start, prefix_end, tl.load(block_ptr + 5)


@triton.jit
def _split_key_ranges(
    start, end, own_start, prefix_start, prefix_end,
    CAUSAL: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Split the two key ranges of a query block into a part of whole key blocks and a rest that needs a mask.

    The prefix is [prefix_start, prefix_end); keys before the returned prefix_whole form whole blocks. The own segment
    is [own_start, own_end); keys before own_whole form whole blocks that all queries of the block attend to. With a
    causal mask these are keys before the first query, and the rest contains the diagonal.
    """
    prefix_whole = prefix_start + (prefix_end - prefix_start) // BLOCK_KEYS * BLOCK_KEYS
    own_end = tl.minimum(start + BLOCK_QUERIES, end) if CAUSAL else end
    own_whole = own_start + ((start if CAUSAL else end) - own_start) // BLOCK_KEYS * BLOCK_KEYS
    return prefix_whole, own_whole, own_end


@triton.jit
def _attend(
    accumulator, max_score, sum_exp, query, query_tokens, key_ptr, value_ptr, key_stride, value_stride,
    start, stop, end, exp2_scale, channels,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Update the online softmax of a query block with the key blocks that begin in [start, stop).

    Without MASKED, all of these keys must be visible to all queries. With MASKED, keys >= end are hidden, and with
    CAUSAL also the keys after a query. Hidden scores are -inf. A query must see at least one key of the first block
    that it visits: otherwise max_score stays -inf and the differences below are NaN.
    """
    for key_start in range(start, stop, BLOCK_KEYS):
        key = _load_tokens(key_ptr, key_stride, key_start, end, channels, BLOCK_KEYS, HEAD_DIM)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * exp2_scale
        if MASKED:
            key_tokens = key_start + tl.arange(0, BLOCK_KEYS)
            visible = (key_tokens < end)[None, :]
            if CAUSAL:
                visible = visible & (query_tokens[:, None] >= key_tokens[None, :])
            scores = tl.where(visible, scores, float("-inf"))
        # Rescale what was accumulated so far to the new maximum. The first time, max_score is -inf and rescale is 0.
        new_max = tl.maximum(max_score, tl.max(scores, 1))
        rescale = tl.exp2(max_score - new_max)
        p = tl.exp2(scores - new_max[:, None])
        sum_exp = sum_exp * rescale + tl.sum(p, 1)
        value = _load_tokens(value_ptr, value_stride, key_start, end, channels, BLOCK_KEYS, HEAD_DIM)
        accumulator = accumulator * rescale[:, None]
        accumulator = tl.dot(p.to(value.dtype), value, accumulator, input_precision=PRECISION)
        max_score = new_max
    return accumulator, max_score, sum_exp


@triton.jit(do_not_specialize=["num_queries"])
def forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,  # contiguous [queries, num_heads, head_dim]
    lse_ptr,  # float32 [num_heads, queries]: L, base 2
    blocks_ptr,  # int32 [num_blocks, 6], see _load_query_block
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    num_queries,
    exp2_scale,  # scale * log2(e)
    NUM_HEADS: tl.constexpr,
    HEADS_PER_KV_HEAD: tl.constexpr,  # query heads that share a key-value head
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,  # head_dim rounded up to a power of two; the channels above HEAD_DIM are 0
    PRECISION: tl.constexpr,  # input precision of tl.dot for float32 inputs: "ieee" or "tf32"
):
    """Compute O = softmax(S) V and L for one block of queries of one head. Grid: (num_heads, query blocks)."""
    start, end, own_start, prefix_start, prefix_end, row = _load_query_block(blocks_ptr)
    head = tl.program_id(0).to(tl.int64)
    key_ptr += head // HEADS_PER_KV_HEAD * key_head_stride
    value_ptr += head // HEADS_PER_KV_HEAD * value_head_stride

    channels = tl.arange(0, BLOCK_DIM)
    query_tokens = start + tl.arange(0, BLOCK_QUERIES)
    end_row = row + end - start
    query = _load_tokens(
        query_ptr + head * query_head_stride, query_stride, row, end_row, channels, BLOCK_QUERIES, HEAD_DIM
    )
    accumulator = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], tl.float32)
    max_score = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    sum_exp = tl.zeros([BLOCK_QUERIES], tl.float32)

    # Only the end of each range needs a mask. Every query sees a key of the first block that it visits: the prefix is
    # visible as a whole, and without one the first block is whole or begins with the segment's first token.
    prefix_whole, own_whole, own_end = _split_key_ranges(
        start, end, own_start, prefix_start, prefix_end, CAUSAL, BLOCK_QUERIES, BLOCK_KEYS
    )
    accumulator, max_score, sum_exp = _attend(
        accumulator, max_score, sum_exp, query, query_tokens, key_ptr, value_ptr, key_stride, value_stride,
        prefix_start, prefix_whole, prefix_end, exp2_scale, channels, False, False, BLOCK_KEYS, HEAD_DIM, PRECISION,
    )  # fmt: skip
    accumulator, max_score, sum_exp = _attend(
        accumulator, max_score, sum_exp, query, query_tokens, key_ptr, value_ptr, key_stride, value_stride,
        prefix_whole, prefix_end, prefix_end, exp2_scale, channels, True, False, BLOCK_KEYS, HEAD_DIM, PRECISION,
    )  # fmt: skip
    accumulator, max_score, sum_exp = _attend(
        accumulator, max_score, sum_exp, query, query_tokens, key_ptr, value_ptr, key_stride, value_stride,
        own_start, own_whole, own_end, exp2_scale, channels, False, False, BLOCK_KEYS, HEAD_DIM, PRECISION,
    )  # fmt: skip
    accumulator, max_score, sum_exp = _attend(
        accumulator, max_score, sum_exp, query, query_tokens, key_ptr, value_ptr, key_stride, value_stride,
        own_whole, own_end, own_end, exp2_scale, channels, True, CAUSAL, BLOCK_KEYS, HEAD_DIM, PRECISION,
    )  # fmt: skip

    _store_tokens(
        out_ptr + head * HEAD_DIM, NUM_HEADS * HEAD_DIM, row, end_row, channels, accumulator / sum_exp[:, None],
        BLOCK_QUERIES, HEAD_DIM,
    )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_QUERIES)
    tl.store(lse_ptr + head * num_queries + rows, max_score + tl.log2(sum_exp), mask=rows < end_row)


@triton.jit
def _accumulate_query_gradient(
    grad_query, query, grad_out, lse, delta, query_tokens, key_ptr, value_ptr, key_stride, value_stride,
    start, stop, end, exp2_scale, channels,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dS K over the key blocks that begin in [start, stop). The mask is that of `_attend`.

    P is recomputed from the scores and the log-sum-exp: no running maximum is needed. Hidden entries of P become 0. dP
    comes first, since Triton 3.8 then needs fewer registers.
    """
    for key_start in range(start, stop, BLOCK_KEYS):
        key = _load_tokens(key_ptr, key_stride, key_start, end, channels, BLOCK_KEYS, HEAD_DIM)
        value = _load_tokens(value_ptr, value_stride, key_start, end, channels, BLOCK_KEYS, HEAD_DIM)
        grad_p = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * exp2_scale
        p = tl.exp2(scores - lse[:, None])
        if MASKED:
            key_tokens = key_start + tl.arange(0, BLOCK_KEYS)
            visible = (key_tokens < end)[None, :]
            if CAUSAL:
                visible = visible & (query_tokens[:, None] >= key_tokens[None, :])
            p = tl.where(visible, p, 0.0)
        grad_scores = p * (grad_p - delta[:, None])
        grad_query = tl.dot(grad_scores.to(key.dtype), key, grad_query, input_precision=PRECISION)
    return grad_query


@triton.jit(do_not_specialize=["num_queries"])
def query_gradient_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    grad_out_ptr,  # contiguous, like out and grad_query
    lse_ptr,
    delta_ptr,  # float32 [num_heads, queries], output: the key-gradient kernel reads it
    grad_query_ptr,
    blocks_ptr,  # int32 [num_blocks, 6], see _load_query_block
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    num_queries,
    scale,
    exp2_scale,
    NUM_HEADS: tl.constexpr,
    HEADS_PER_KV_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute delta and dQ = scale dS K for one block of queries of one head. Grid: (num_heads, query blocks)."""
    start, end, own_start, prefix_start, prefix_end, row = _load_query_block(blocks_ptr)
    head = tl.program_id(0)
    key_ptr += tl.cast(head // HEADS_PER_KV_HEAD, tl.int64) * key_head_stride
    value_ptr += tl.cast(head // HEADS_PER_KV_HEAD, tl.int64) * value_head_stride

    channels = tl.arange(0, BLOCK_DIM)
    query_tokens = start + tl.arange(0, BLOCK_QUERIES)
    rows, end_row = row + tl.arange(0, BLOCK_QUERIES), row + end - start
    query_ptr += tl.cast(head, tl.int64) * query_head_stride
    query = _load_tokens(query_ptr, query_stride, row, end_row, channels, BLOCK_QUERIES, HEAD_DIM)
    token_stride = NUM_HEADS * HEAD_DIM
    out_ptr, grad_out_ptr = out_ptr + head * HEAD_DIM, grad_out_ptr + head * HEAD_DIM
    out = _load_tokens(out_ptr, token_stride, row, end_row, channels, BLOCK_QUERIES, HEAD_DIM)
    grad_out = _load_tokens(grad_out_ptr, token_stride, row, end_row, channels, BLOCK_QUERIES, HEAD_DIM)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    lse_offset = tl.cast(head, tl.int64) * num_queries
    tl.store(delta_ptr + lse_offset + rows, delta, mask=rows < end_row)
    # Queries >= end in the last block of a segment load 0 instead of a log-sum-exp. grad_out and delta are 0 for them
    # too, and their results are not stored.
    lse = tl.load(lse_ptr + lse_offset + rows, mask=rows < end_row, other=0.0)
    grad_query = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], tl.float32)

    prefix_whole, own_whole, own_end = _split_key_ranges(
        start, end, own_start, prefix_start, prefix_end, CAUSAL, BLOCK_QUERIES, BLOCK_KEYS
    )
    grad_query = _accumulate_query_gradient(
        grad_query, query, grad_out, lse, delta, query_tokens, key_ptr, value_ptr, key_stride, value_stride,
        prefix_start, prefix_whole, prefix_end, exp2_scale, channels, False, False, BLOCK_KEYS, HEAD_DIM, PRECISION,
    )  # fmt: skip
    grad_query = _accumulate_query_gradient(
        grad_query, query, grad_out, lse, delta, query_tokens, key_ptr, value_ptr, key_stride, value_stride,
        prefix_whole, prefix_end, prefix_end, exp2_scale, channels, True, False, BLOCK_KEYS, HEAD_DIM, PRECISION,
    )  # fmt: skip
    grad_query = _accumulate_query_gradient(
        grad_query, query, grad_out, lse, delta, query_tokens, key_ptr, value_ptr, key_stride, value_stride,
        own_start, own_whole, own_end, exp2_scale, channels, False, False, BLOCK_KEYS, HEAD_DIM, PRECISION,
    )  # fmt: skip
    grad_query = _accumulate_query_gradient(
        grad_query, query, grad_out, lse, delta, query_tokens, key_ptr, value_ptr, key_stride, value_stride,
        own_whole, own_end, own_end, exp2_scale, channels, True, CAUSAL, BLOCK_KEYS, HEAD_DIM, PRECISION,
    )  # fmt: skip
    # The block is loaded again, and `head` has only 32 bits: the loops leave no register to keep more in.
    block_ptr = blocks_ptr + tl.program_id(1) * 6
    start, end, row = tl.load(block_ptr), tl.load(block_ptr + 1), tl.load(block_ptr + 5)
    _store_tokens(
        grad_query_ptr + head * HEAD_DIM, token_stride, row, row + end - start, channels, grad_query * scale,
        BLOCK_QUERIES, HEAD_DIM,
    )  # fmt: skip


@triton.jit
def _accumulate_key_gradients(
    grad_key, grad_value, key, value, key_rows,
    query_ptr, grad_out_ptr, lse_ptr, delta_ptr, query_stride, grad_out_stride,
    start, end, exp2_scale, channels,
    CAUSAL: tl.constexpr, BLOCK_QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dS^T Q and P^T dO over the queries in rows [start, end).

    `key_rows` are the rows of the keys' own tokens; with CAUSAL, rows before them are hidden. Scores are computed
    transposed, [keys, queries], so that both matmuls use P and dS as their left operand.
    """
    for query_start in range(start, end, BLOCK_QUERIES):
        rows = query_start + tl.arange(0, BLOCK_QUERIES)
        query = _load_tokens(query_ptr, query_stride, query_start, end, channels, BLOCK_QUERIES, HEAD_DIM)
        grad_out = _load_tokens(grad_out_ptr, grad_out_stride, query_start, end, channels, BLOCK_QUERIES, HEAD_DIM)
        lse = tl.load(lse_ptr + rows, mask=rows < end, other=float("inf"))  # hidden queries: P is 0
        delta = tl.load(delta_ptr + rows, mask=rows < end, other=0.0)
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION) * exp2_scale  # [keys, queries]
        p = tl.exp2(scores - lse[None, :])
        if CAUSAL:
            p = tl.where(rows[None, :] >= key_rows[:, None], p, 0.0)
        grad_value = tl.dot(p.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION)
        grad_p = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION)
        grad_scores = p * (grad_p - delta[None, :])
        grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit(do_not_specialize=["num_queries"])
def key_gradient_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    grad_out_ptr,
    lse_ptr,
    delta_ptr,
    grad_key_ptr,  # contiguous [tokens, num_heads, NUM_SPLITS, head_dim], like grad_value
    grad_value_ptr,
    blocks_ptr,  # int32 [num_blocks, 6]: first key, end of its segment, first masked, first whole and end range, split
    ranges_ptr,  # int32 [num_ranges, 3]: first and end row of queries, the first query's token minus its row
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    num_queries,
    scale,
    exp2_scale,
    NUM_HEADS: tl.constexpr,
    HEADS_PER_KV_HEAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_SPLITS: tl.constexpr,  # programs that share the queries of a block
    CAUSAL: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the part of dK and dV that a query head contributes to a block of keys. Grid: (num_heads, key blocks)."""
    block_ptr = blocks_ptr + tl.program_id(1) * 6
    start, end = tl.load(block_ptr), tl.load(block_ptr + 1)
    # Indices into the table of ranges: first those with queries on the causal diagonal, then those without.
    first_masked, first_whole, end_range = tl.load(block_ptr + 2), tl.load(block_ptr + 3), tl.load(block_ptr + 4)
    split = tl.load(block_ptr + 5)
    head = tl.program_id(0).to(tl.int64)
    key_ptr += head // HEADS_PER_KV_HEAD * key_head_stride
    value_ptr += head // HEADS_PER_KV_HEAD * value_head_stride
    query_ptr += head * query_head_stride
    grad_out_ptr += head * HEAD_DIM
    lse_ptr += head * num_queries
    delta_ptr += head * num_queries

    channels = tl.arange(0, BLOCK_DIM)
    key_tokens = start + tl.arange(0, BLOCK_KEYS)
    key = _load_tokens(key_ptr, key_stride, start, end, channels, BLOCK_KEYS, HEAD_DIM)
    value = _load_tokens(value_ptr, value_stride, start, end, channels, BLOCK_KEYS, HEAD_DIM)
    grad_key = tl.zeros([BLOCK_KEYS, BLOCK_DIM], tl.float32)
    grad_value = tl.zeros([BLOCK_KEYS, BLOCK_DIM], tl.float32)
    token_stride = NUM_HEADS * HEAD_DIM

    if CAUSAL:
        for range_index in range(first_masked, first_whole):
            range_ptr = ranges_ptr + 3 * range_index
            range_start, range_end, shift = tl.load(range_ptr), tl.load(range_ptr + 1), tl.load(range_ptr + 2)
            grad_key, grad_value = _accumulate_key_gradients(
                grad_key, grad_value, key, value, key_tokens - shift, query_ptr, grad_out_ptr, lse_ptr, delta_ptr,
                query_stride, token_stride, range_start, range_end, exp2_scale, channels,
                True, BLOCK_QUERIES, HEAD_DIM, PRECISION,
            )  # fmt: skip
    for range_index in range(first_whole, end_range):
        range_start, range_end = tl.load(ranges_ptr + 3 * range_index), tl.load(ranges_ptr + 3 * range_index + 1)
        grad_key, grad_value = _accumulate_key_gradients(
            grad_key, grad_value, key, value, key_tokens, query_ptr, grad_out_ptr, lse_ptr, delta_ptr,
            query_stride, token_stride, range_start, range_end, exp2_scale, channels,
            False, BLOCK_QUERIES, HEAD_DIM, PRECISION,
        )  # fmt: skip

    offset = (head * NUM_SPLITS + split) * HEAD_DIM
    part_stride = token_stride * NUM_SPLITS
    _store_tokens(grad_key_ptr + offset, part_stride, start, end, channels, grad_key * scale, BLOCK_KEYS, HEAD_DIM)
    _store_tokens(grad_value_ptr + offset, part_stride, start, end, channels, grad_value, BLOCK_KEYS, HEAD_DIM)
