"""Attention by flash-attn, if it is installed, for packed segments that share no prefix.

No other module imports flash-attn.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from vcr1_kernels.backend import int32_tensor
from vcr1_kernels.layout import SegmentLayout

_MAX_HEAD_DIM = 256


def use_flash_attn(query: Tensor, layout: SegmentLayout) -> bool:
    """Return whether flash-attn computes this attention.

    It is used if it is installed, the tensors are half-precision GPU tensors, every token has a query, and no segment
    has a prefix.
    """
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[2] <= _MAX_HEAD_DIM
        and flash_attn_is_installed()
        and layout.queries is None
        and max(layout.prefixes) < 0
    )


@lru_cache(maxsize=1)
def flash_attn_is_installed() -> bool:
    """Return whether flash-attn 2 is installed.

    flash-attn-4 installs a folder of the same name that has no `__init__.py`. It is another library, with another
    interface, and does not count.
    """
    found = find_spec("flash_attn")
    return found is not None and found.origin is not None


def flash_attention(query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, scale: float) -> Tensor:
    """Compute `shared_prefix_attention` of independent segments; same arguments and shapes."""
    from flash_attn import flash_attn_varlen_func

    cu_seqlens = _cu_seqlens(layout, query.device)
    longest = max(layout.lengths)
    return flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=layout.causal,
        deterministic=torch.are_deterministic_algorithms_enabled(),  # the backward pass without atomic additions
    )


@lru_cache(maxsize=64)
def _cu_seqlens(layout: SegmentLayout, device: torch.device) -> Tensor:
    """Return the cumulative sequence lengths that flash-attn expects: `layout.starts`, int32 [num_segments + 1]."""
    return int32_tensor(layout.starts, device)
