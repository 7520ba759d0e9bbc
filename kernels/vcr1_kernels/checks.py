"""Argument checks of the public ops. Every message names the argument and the value that was received."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def require_shape(name: str, tensor: Tensor, *shape: int | str) -> None:
    """Raise ValueError unless `tensor` has the given shape. A string matches any size and names the dimension."""
    matches = tensor.dim() == len(shape) and all(
        isinstance(size, str) or size == actual for size, actual in zip(shape, tensor.shape, strict=True)
    )
    if not matches:
        raise ValueError(f"{name} must be [{', '.join(map(str, shape))}], got {list(tensor.shape)}")


def require_floating(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` has a floating-point dtype."""
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {tensor.dtype}")


def require_contiguous_last_dim(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless neighbouring elements of the last dimension are adjacent in memory."""
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"the last dimension of {name} must be contiguous, its stride is {tensor.stride(-1)}; call .contiguous()"
        )


def require_token_ids(name: str, token_ids: Tensor, num_tokens: int, vocab_size: int) -> None:
    """Raise ValueError unless `token_ids` is an int64 tensor [num_tokens] with values in [0, vocab_size).

    On a GPU the range is checked by an assertion on the device, so that the host does not have to synchronize.
    """
    require_shape(name, token_ids, num_tokens)
    if token_ids.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {token_ids.dtype}")
    in_range = (token_ids >= 0) & (token_ids < vocab_size)
    if token_ids.is_cuda:
        torch._assert_async(in_range.all())
    elif not in_range.all():
        position = int((~in_range).nonzero()[0])
        raise ValueError(
            f"{name}[{position}] is {int(token_ids[position])}, outside the vocabulary of {vocab_size}; "
            "remove padding tokens first"
        )


def require_temperature(temperature: float) -> None:
    """Raise ValueError unless the temperature is positive and finite."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def require_equal_to_one(name: str, scalar: Tensor) -> None:
    """Raise ValueError unless `scalar` is 1 up to rounding (1e-5). On a GPU this is an assertion on the device."""
    is_one = (scalar - 1).abs() < 1e-5
    if scalar.is_cuda:
        torch._assert_async(is_one)
    elif not is_one:
        raise ValueError(f"{name} must be 1, got {float(scalar)}")
