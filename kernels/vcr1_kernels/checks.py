"""Validation at the ops' boundary: every message names the argument."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def require_shape(name: str, tensor: Tensor, *shape: int | str) -> None:
    """Raise ValueError unless `tensor` has this shape; a string stands for any size and names the dimension."""
    matches = tensor.dim() == len(shape) and all(
        isinstance(size, str) or size == actual for size, actual in zip(shape, tensor.shape, strict=True)
    )
    if not matches:
        raise ValueError(f"{name} must be [{', '.join(map(str, shape))}], got {list(tensor.shape)}")


def require_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def require_contiguous_rows(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the last dimension lies contiguously in memory."""
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"the last dimension of {name} must be contiguous, its stride is {tensor.stride(-1)}; call .contiguous()"
        )


def require_token_ids(name: str, token_ids: Tensor, num_tokens: int, vocab_size: int) -> None:
    """Raise ValueError unless `token_ids` is an int64 [num_tokens] below `vocab_size`.

    On a GPU the range is asserted on the device, so that the host does not wait.
    """
    require_shape(name, token_ids, num_tokens)
    if token_ids.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {token_ids.dtype}")
    in_range = (token_ids >= 0) & (token_ids < vocab_size)
    if token_ids.is_cuda:
        torch._assert_async(in_range.all())
    elif not in_range.all():
        row = int((~in_range).nonzero()[0])
        raise ValueError(
            f"{name}[{row}] is {int(token_ids[row])}, outside the vocabulary of {vocab_size}; drop padding rows first"
        )


def require_temperature(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def require_one(name: str, scalar: Tensor) -> None:
    """Raise ValueError unless `scalar` is 1, up to rounding. On a GPU it is asserted on the device."""
    is_one = (scalar - 1).abs() < 1e-5
    if scalar.is_cuda:
        torch._assert_async(is_one)
    elif not is_one:
        raise ValueError(f"{name} must be 1, got {float(scalar)}")
