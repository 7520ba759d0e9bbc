from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vcr1_kernels import mrope, reference

from tests.kernels.accuracy import assert_accurate, gradients, to_float64


def _inputs(dtype: torch.dtype, device: torch.device, head_dim: int = 20) -> list[Tensor]:
    # The two halves differ. The op allows that, although the halves of a real RoPE table are equal.
    angles = 10 * torch.randn(7, head_dim)
    tensors = (torch.randn(7, 5, head_dim), torch.randn(7, 2, head_dim))
    return [*(tensor.to(device, dtype) for tensor in tensors), angles.cos().to(device), angles.sin().to(device)]


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_float64(dtype: torch.dtype, inplace: bool, device: torch.device) -> None:
    query, key, cos, sin = _inputs(dtype, device)

    def op(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return mrope(query * 1 if inplace else query, key * 1 if inplace else key, cos, sin, inplace=inplace)

    def reference_op(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return reference.mrope(query, key, *to_float64(cos, sin))

    exact = to_float64(query, key)
    for actual, expected in zip(op(query, key), reference_op(*exact), strict=True):
        assert actual.dtype == dtype
        assert_accurate(actual, expected, dtype)
    for actual, expected in zip(gradients(op, [query, key]), gradients(reference_op, exact), strict=True):
        assert_accurate(actual, expected, dtype)


def test_rotates_slices_of_a_projection_in_place(device: torch.device) -> None:
    query, key, cos, sin = _inputs(torch.float32, device)
    packed = torch.cat([query, key], dim=1).requires_grad_()
    projection = packed * 1
    rotated_query, rotated_key = mrope(projection[:, :5], projection[:, 5:], cos, sin)
    expected = torch.cat(reference.mrope(query, key, cos, sin), dim=1)
    torch.testing.assert_close(projection, expected)
    assert rotated_query.data_ptr() == projection.data_ptr()
    (rotated_query.sum() + 2 * rotated_key.sum()).backward()
    leaves = [query.requires_grad_(), key.requires_grad_()]
    expected_query, expected_key = reference.mrope(*leaves, cos, sin)
    grads = torch.autograd.grad(expected_query.sum() + 2 * expected_key.sum(), leaves)
    torch.testing.assert_close(packed.grad, torch.cat(grads, dim=1))


def test_returns_rotated_copies_of_the_outputs_of_split(device: torch.device) -> None:
    query, key, cos, sin = _inputs(torch.float32, device)
    projection = torch.cat([query, key], dim=1).requires_grad_() * 1
    rotated = mrope(*projection.split((5, 2), dim=1), cos, sin, inplace=False)
    for actual, expected in zip(rotated, reference.mrope(query, key, cos, sin), strict=True):
        torch.testing.assert_close(actual, expected)
        assert actual.is_contiguous()
    torch.testing.assert_close(projection, torch.cat([query, key], dim=1))


def test_rotation_by_90_degrees(device: torch.device) -> None:
    query = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], device=device)
    key = query.clone()
    mrope(query, key, torch.zeros(1, 4, device=device), torch.ones(1, 4, device=device))
    assert query.tolist() == key.tolist() == [[[-3.0, -4.0, 1.0, 2.0]]]


def test_empty_input(device: torch.device) -> None:
    query, key = torch.empty(0, 4, 8, device=device), torch.empty(0, 2, 8, device=device)
    assert mrope(query, key, torch.empty(0, 8, device=device), torch.empty(0, 8, device=device))[0].shape == (0, 4, 8)


def test_invalid_input_raises() -> None:
    query, key, cos, sin = _inputs(torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"cos must be \[7, 20\], got \[6, 20\]"):
        mrope(query, key, cos[1:], sin)
    with pytest.raises(ValueError, match=r"key must be \[7, num_kv_heads, 20\]"):
        mrope(query, key[1:], cos, sin)
    with pytest.raises(ValueError, match="head_dim must be even"):
        mrope(query[..., :19], key[..., :19], cos[:, :19], sin[:, :19])
