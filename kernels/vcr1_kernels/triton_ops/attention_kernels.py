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
exp(x) = exp2(x * log2(e)), and the factor log2(e) is folded into the scale. The scale, which is positive, is applied
with the subtraction in the exponent, as one multiply-add: the maximum is that of the unscaled scores.

Loads. The tensor memory accelerator (TMA) loads blocks of queries, keys and values: it computes addresses and bounds
without the program's registers. It knows the bounds of tensors, not those of segments, so that a block may end with
tokens of the next segment. Their P is 0; they must be finite, like everything in the sequence.

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
def _load_tile(descriptor, head, start, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Load [BLOCK, BLOCK_DIM] of one head from token `start` on.

    Tokens and channels outside of the tensor are 0. Tokens after the end of a segment are those of the next one: the
    caller masks them.
    """
    return descriptor.load([head, start, 0]).reshape(BLOCK, BLOCK_DIM)


@triton.jit
def _count_key_blocks(
    start, end, own_start, prefix_start, prefix_end,
    CAUSAL: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """Return how many key blocks a query block visits: whole ones and others, of its prefix and of its own segment.

    A whole block has only keys that all queries of the block attend to. With a causal mask, the own segment's are
    before the first query, and its other blocks contain the diagonal.
    """
    prefix_whole = (prefix_end - prefix_start) // BLOCK_KEYS
    prefix_rest = tl.where(prefix_start + prefix_whole * BLOCK_KEYS < prefix_end, 1, 0)
    own_end = tl.minimum(start + BLOCK_QUERIES, end) if CAUSAL else end
    own_whole = ((start if CAUSAL else end) - own_start) // BLOCK_KEYS
    own_rest = tl.cdiv(own_end - own_start, BLOCK_KEYS) - own_whole
    return prefix_whole, own_whole, prefix_rest, own_rest


@triton.jit
def _mask_scores(
    scores, query_tokens, key_start, end, in_prefix, hidden, CAUSAL: tl.constexpr, BLOCK_KEYS: tl.constexpr
):
    """Set the scores of keys >= end to `hidden`, and with CAUSAL those of the own segment's keys after a query."""
    key_tokens = key_start + tl.arange(0, BLOCK_KEYS)
    visible = (key_tokens < end)[None, :]
    if CAUSAL:
        visible = visible & (in_prefix | (query_tokens[:, None] >= key_tokens[None, :]))
    return tl.where(visible, scores, hidden)


@triton.jit
def _attend(
    accumulator, max_score, sum_exp, query, query_tokens, key_desc, value_desc, kv_head, key_start, end, in_prefix,
    exp2_scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Update the online softmax of a query block with one key block."""
    key = _load_tile(key_desc, kv_head, key_start, BLOCK_KEYS, BLOCK_DIM)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if MASKED:
        scores = _mask_scores(scores, query_tokens, key_start, end, in_prefix, float("-inf"), CAUSAL, BLOCK_KEYS)
    new_max = tl.maximum(max_score, tl.max(scores, 1))
    rescale = tl.exp2((max_score - new_max) * exp2_scale)
    p = tl.exp2(scores * exp2_scale - (new_max * exp2_scale)[:, None])
    sum_exp = sum_exp * rescale + tl.sum(p, 1)
    value = _load_tile(value_desc, kv_head, key_start, BLOCK_KEYS, BLOCK_DIM)
    accumulator = accumulator * rescale[:, None]
    accumulator = tl.dot(p.to(value.dtype), value, accumulator, input_precision=PRECISION)
    return accumulator, new_max, sum_exp


@triton.jit(do_not_specialize=["lse_stride"])
def forward_kernel(
    query_desc,  # [num_heads, queries, head_dim], blocks of [1, BLOCK_QUERIES, BLOCK_DIM]
    key_desc,  # [kv_heads, tokens, head_dim], blocks of [1, BLOCK_KEYS, BLOCK_DIM], like value
    value_desc,
    out_ptr,  # contiguous [queries, num_heads, head_dim]
    lse_ptr,  # float32 [num_heads, queries]: L, base 2
    lse_stride,  # of a head
    blocks_ptr,  # int32 [num_blocks, 6], see _load_query_block
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
    head = tl.program_id(0)
    kv_head = head // HEADS_PER_KV_HEAD
    query_tokens = start + tl.arange(0, BLOCK_QUERIES)
    query = _load_tile(query_desc, head, row, BLOCK_QUERIES, BLOCK_DIM)
    accumulator = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], tl.float32)
    max_score = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    sum_exp = tl.zeros([BLOCK_QUERIES], tl.float32)

    prefix_whole, own_whole, prefix_rest, own_rest = _count_key_blocks(
        start, end, own_start, prefix_start, prefix_end, CAUSAL, BLOCK_QUERIES, BLOCK_KEYS
    )
    for block in range(prefix_whole + own_whole):
        first = tl.where(block < prefix_whole, prefix_start, own_start - prefix_whole * BLOCK_KEYS)
        accumulator, max_score, sum_exp = _attend(
            accumulator, max_score, sum_exp, query, query_tokens, key_desc, value_desc, kv_head,
            first + block * BLOCK_KEYS, 0, False, exp2_scale, False, CAUSAL, BLOCK_KEYS, BLOCK_DIM, PRECISION,
        )  # fmt: skip
    for block in range(prefix_rest + own_rest):
        in_prefix = block < prefix_rest
        first = tl.where(
            in_prefix, prefix_start + prefix_whole * BLOCK_KEYS, own_start + (own_whole - prefix_rest) * BLOCK_KEYS
        )
        accumulator, max_score, sum_exp = _attend(
            accumulator, max_score, sum_exp, query, query_tokens, key_desc, value_desc, kv_head,
            first + block * BLOCK_KEYS, tl.where(in_prefix, prefix_end, end), in_prefix, exp2_scale,
            True, CAUSAL, BLOCK_KEYS, BLOCK_DIM, PRECISION,
        )  # fmt: skip

    end_row = row + end - start
    channels = tl.arange(0, BLOCK_DIM)
    _store_tokens(
        out_ptr + head * HEAD_DIM, NUM_HEADS * HEAD_DIM, row, end_row, channels, accumulator / sum_exp[:, None],
        BLOCK_QUERIES, HEAD_DIM,
    )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_QUERIES)
    lse = max_score * exp2_scale + tl.log2(sum_exp)
    tl.store(lse_ptr + tl.cast(head, tl.int64) * lse_stride + rows, lse, mask=rows < end_row)


@triton.jit
def _accumulate_query_gradient(
    grad_query, query, grad_out, lse, delta, query_tokens, key_desc, value_desc, kv_head, key_start, end, in_prefix,
    exp2_scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dS K of one key block; the mask is that of `_attend`.

    P is recomputed from the scores and the log-sum-exp: no running maximum is needed. Hidden entries of P become 0. dP
    comes first, since Triton 3.8 then needs fewer registers.
    """
    key = _load_tile(key_desc, kv_head, key_start, BLOCK_KEYS, BLOCK_DIM)
    value = _load_tile(value_desc, kv_head, key_start, BLOCK_KEYS, BLOCK_DIM)
    grad_p = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    p = tl.exp2(scores * exp2_scale - lse[:, None])
    if MASKED:
        p = _mask_scores(p, query_tokens, key_start, end, in_prefix, 0.0, CAUSAL, BLOCK_KEYS)
    grad_scores = p * (grad_p - delta[:, None])
    return tl.dot(grad_scores.to(key.dtype), key, grad_query, input_precision=PRECISION)


@triton.jit(do_not_specialize=["lse_stride"])
def query_gradient_kernel(
    query_desc,  # like those of forward_kernel
    key_desc,
    value_desc,
    grad_out_desc,  # like query
    out_ptr,  # contiguous [queries, num_heads, head_dim], like grad_query
    lse_ptr,
    delta_ptr,  # like lse, output: the key-gradient kernel reads it
    lse_stride,
    grad_query_ptr,
    blocks_ptr,  # int32 [num_blocks, 6], see _load_query_block
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
    kv_head = head // HEADS_PER_KV_HEAD
    channels = tl.arange(0, BLOCK_DIM)
    query_tokens = start + tl.arange(0, BLOCK_QUERIES)
    rows, end_row = row + tl.arange(0, BLOCK_QUERIES), row + end - start
    query = _load_tile(query_desc, head, row, BLOCK_QUERIES, BLOCK_DIM)
    grad_out = _load_tile(grad_out_desc, head, row, BLOCK_QUERIES, BLOCK_DIM)
    token_stride = NUM_HEADS * HEAD_DIM
    out = _load_tokens(out_ptr + head * HEAD_DIM, token_stride, row, end_row, channels, BLOCK_QUERIES, HEAD_DIM)
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    lse_offset = tl.cast(head, tl.int64) * lse_stride
    tl.store(delta_ptr + lse_offset + rows, delta, mask=rows < end_row)
    # Rows after the end of a segment have queries of the next one. With an infinite log-sum-exp their P is 0.
    lse = tl.load(lse_ptr + lse_offset + rows, mask=rows < end_row, other=float("inf"))
    grad_query = tl.zeros([BLOCK_QUERIES, BLOCK_DIM], tl.float32)

    prefix_whole, own_whole, prefix_rest, own_rest = _count_key_blocks(
        start, end, own_start, prefix_start, prefix_end, CAUSAL, BLOCK_QUERIES, BLOCK_KEYS
    )
    if PRECISION == "ieee":  # all blocks in the masked loop: with two loops, float32 spills registers
        prefix_rest, own_rest = prefix_whole + prefix_rest, own_whole + own_rest
        prefix_whole, own_whole = 0, 0
    for block in range(prefix_whole + own_whole):
        first = tl.where(block < prefix_whole, prefix_start, own_start - prefix_whole * BLOCK_KEYS)
        grad_query = _accumulate_query_gradient(
            grad_query, query, grad_out, lse, delta, query_tokens, key_desc, value_desc, kv_head,
            first + block * BLOCK_KEYS, 0, False, exp2_scale, False, CAUSAL, BLOCK_KEYS, BLOCK_DIM, PRECISION,
        )  # fmt: skip
    for block in range(prefix_rest + own_rest):
        in_prefix = block < prefix_rest
        first = tl.where(
            in_prefix, prefix_start + prefix_whole * BLOCK_KEYS, own_start + (own_whole - prefix_rest) * BLOCK_KEYS
        )
        grad_query = _accumulate_query_gradient(
            grad_query, query, grad_out, lse, delta, query_tokens, key_desc, value_desc, kv_head,
            first + block * BLOCK_KEYS, tl.where(in_prefix, prefix_end, end), in_prefix, exp2_scale,
            True, CAUSAL, BLOCK_KEYS, BLOCK_DIM, PRECISION,
        )  # fmt: skip
    _store_tokens(
        grad_query_ptr + head * HEAD_DIM, token_stride, row, end_row, channels, grad_query * scale,
        BLOCK_QUERIES, HEAD_DIM,
    )  # fmt: skip


@triton.jit
def _accumulate_key_gradients(
    grad_key, grad_value, key, value, key_rows, query_desc, grad_out_desc, head, lse_desc, delta_desc,
    start, end, exp2_scale,
    CAUSAL: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dS^T Q and P^T dO over the queries in rows [start, end).

    `key_rows` are the rows of the keys' own tokens; with CAUSAL, rows before them are hidden. Scores are computed
    transposed, [keys, queries], so that both matmuls use P and dS as their left operand. lse and delta are loaded from
    multiples of 16 bytes, which Triton demands, so that the first tile may begin up to 3 rows before `start`.
    """
    # With several accumulators for each product, the kernel spills registers on Blackwell (triton 3.9).
    for query_start in tl.range(start // 4 * 4, end, BLOCK_QUERIES, disallow_acc_multi_buffer=True):
        rows = query_start + tl.arange(0, BLOCK_QUERIES)
        query = _load_tile(query_desc, head, query_start, BLOCK_QUERIES, BLOCK_DIM)
        grad_out = _load_tile(grad_out_desc, head, query_start, BLOCK_QUERIES, BLOCK_DIM)
        lse = lse_desc.load([head, query_start]).reshape(BLOCK_QUERIES)
        lse = tl.where((rows >= start) & (rows < end), lse, float("inf"))  # other queries are hidden: P is 0
        scores = tl.dot(key, tl.trans(query), input_precision=PRECISION)  # [keys, queries]
        p = tl.exp2(scores * exp2_scale - lse[None, :])
        if CAUSAL:
            p = tl.where(rows[None, :] >= key_rows[:, None], p, 0.0)
        grad_value = tl.dot(p.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION)
        grad_p = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION)
        delta = delta_desc.load([head, query_start]).reshape(BLOCK_QUERIES)
        grad_scores = p * (grad_p - delta[None, :])
        grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@triton.jit
def key_gradient_kernel(
    query_desc,  # [num_heads, queries, head_dim], blocks of [1, BLOCK_QUERIES, BLOCK_DIM], like grad_out
    key_desc,  # [kv_heads, tokens, head_dim], blocks of [1, BLOCK_KEYS, BLOCK_DIM], like value
    value_desc,
    grad_out_desc,
    lse_desc,  # float32 [num_heads, queries], blocks of [1, BLOCK_QUERIES], like delta
    delta_desc,
    grad_key_ptr,  # contiguous [tokens, num_heads, NUM_SPLITS, head_dim], like grad_value
    grad_value_ptr,
    blocks_ptr,  # int32 [num_blocks, 6]: first key, end of its segment, first masked, first whole and end range, split
    ranges_ptr,  # int32 [num_ranges, 3]: first and end row of queries, shift from rows to tokens (see `_key_blocks`)
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
    start = tl.load(block_ptr)
    # Indices into the table of ranges: first those with queries on the causal diagonal, then those without.
    first_masked, first_whole, end_range = tl.load(block_ptr + 2), tl.load(block_ptr + 3), tl.load(block_ptr + 4)
    head = tl.program_id(0)

    key_tokens = start + tl.arange(0, BLOCK_KEYS)
    key = _load_tile(key_desc, head // HEADS_PER_KV_HEAD, start, BLOCK_KEYS, BLOCK_DIM)
    value = _load_tile(value_desc, head // HEADS_PER_KV_HEAD, start, BLOCK_KEYS, BLOCK_DIM)
    grad_key = tl.zeros([BLOCK_KEYS, BLOCK_DIM], tl.float32)
    grad_value = tl.zeros([BLOCK_KEYS, BLOCK_DIM], tl.float32)

    if CAUSAL:
        if PRECISION == "ieee":  # all ranges in the masked loop: with two loops, float32 spills registers
            first_whole = end_range
        for range_index in range(first_masked, first_whole):
            range_ptr = ranges_ptr + 3 * range_index
            range_start, range_end, shift = tl.load(range_ptr), tl.load(range_ptr + 1), tl.load(range_ptr + 2)
            grad_key, grad_value = _accumulate_key_gradients(
                grad_key, grad_value, key, value, key_tokens - shift, query_desc, grad_out_desc, head, lse_desc,
                delta_desc, range_start, range_end, exp2_scale, True, BLOCK_QUERIES, BLOCK_DIM, PRECISION,
            )  # fmt: skip
    for range_index in range(first_whole, end_range):
        range_start, range_end = tl.load(ranges_ptr + 3 * range_index), tl.load(ranges_ptr + 3 * range_index + 1)
        grad_key, grad_value = _accumulate_key_gradients(
            grad_key, grad_value, key, value, key_tokens, query_desc, grad_out_desc, head, lse_desc,
            delta_desc, range_start, range_end, exp2_scale, False, BLOCK_QUERIES, BLOCK_DIM, PRECISION,
        )  # fmt: skip

    # The block is loaded again: the loops leave no register to keep more in.
    block_ptr = blocks_ptr + tl.program_id(1) * 6
    start, end, split = tl.load(block_ptr), tl.load(block_ptr + 1), tl.load(block_ptr + 5)
    channels = tl.arange(0, BLOCK_DIM)
    offset = (tl.cast(head, tl.int64) * NUM_SPLITS + split) * HEAD_DIM
    part_stride = NUM_HEADS * HEAD_DIM * NUM_SPLITS
    _store_tokens(grad_key_ptr + offset, part_stride, start, end, channels, grad_key * scale, BLOCK_KEYS, HEAD_DIM)
    _store_tokens(grad_value_ptr + offset, part_stride, start, end, channels, grad_value, BLOCK_KEYS, HEAD_DIM)
