"""In how many chunks of key-value heads a rank computes attention under context parallelism.

In a module of its own, so that the planner knows it without importing megatron-core, which takes seconds.
"""

from __future__ import annotations

import math

# With more chunks, less communication would be exposed, but the attention of a chunk would be too small for a GPU.
MAX_CHUNKS = 4


def num_chunks(num_kv_heads: int) -> int:
    """Return the number of chunks that a rank's key-value heads are computed in."""
    heads_per_chunk = math.ceil(num_kv_heads / MAX_CHUNKS)
    return math.ceil(num_kv_heads / heads_per_chunk)
