from __future__ import annotations

import math

import pytest
import torch
from vcr1_kernels.checks import (
    require_contiguous_last_dim,
    require_equal_to_one,
    require_floating,
    require_shape,
    require_temperature,
    require_token_ids,
)


def test_wrong_shape_is_rejected() -> None:
    require_shape("x", torch.zeros(3, 4, 0), "tokens", 4, "channels")
    with pytest.raises(ValueError, match=r"x must be \[tokens, 5\], got \[3, 4\]"):
        require_shape("x", torch.zeros(3, 4), "tokens", 5)
    with pytest.raises(ValueError, match=r"x must be \[tokens\], got \[3, 4\]"):
        require_shape("x", torch.zeros(3, 4), "tokens")


def test_integer_tensor_is_rejected() -> None:
    require_floating("x", torch.zeros(1, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"x must be a floating-point tensor, got torch.int64"):
        require_floating("x", torch.zeros(1, dtype=torch.int64))


def test_strided_last_dimension_is_rejected() -> None:
    matrix = torch.zeros(4, 6)
    require_contiguous_last_dim("x", matrix[:, 1:3])
    require_contiguous_last_dim("x", matrix.t()[:, :1])  # the stride of a dimension of size 1 does not matter
    require_contiguous_last_dim("x", matrix.t()[:0])
    with pytest.raises(ValueError, match=r"the last dimension of x must be contiguous, its stride is 6"):
        require_contiguous_last_dim("x", matrix.t())


def test_token_ids_of_wrong_dtype_or_range_are_rejected() -> None:
    require_token_ids("ids", torch.tensor([0, 9]), 2, 10)
    with pytest.raises(ValueError, match="ids must be int64"):
        require_token_ids("ids", torch.tensor([0, 9], dtype=torch.int32), 2, 10)
    with pytest.raises(ValueError, match=r"ids\[1\] is 10, outside the vocabulary of 10; remove padding tokens first"):
        require_token_ids("ids", torch.tensor([0, 10]), 2, 10)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_temperature_must_be_positive_and_finite(temperature: float) -> None:
    require_temperature(0.01)
    with pytest.raises(ValueError, match="temperature must be positive and finite"):
        require_temperature(temperature)


def test_equal_to_one_up_to_rounding() -> None:
    require_equal_to_one("x", torch.tensor(1 + 1e-6))
    with pytest.raises(ValueError, match=r"x must be 1, got 0\.5"):
        require_equal_to_one("x", torch.tensor(0.5))
