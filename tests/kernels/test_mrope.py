from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vcr1_kernels import mrope, qkv_mrope, reference

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


@pytest.mark.parametrize("num_kv_heads, heads_per_kv_head", [(2, 3), (5, 1), (1, 16)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_joint_projection_matches_float64(
    dtype: torch.dtype, has_bias: bool, num_kv_heads: int, heads_per_kv_head: int, device: torch.device
) -> None:
    _, _, cos, sin = _inputs(dtype, device)
    heads = (num_kv_heads, heads_per_kv_head + 2, 20)
    inputs = [tensor.to(device, dtype) for tensor in (torch.randn(7, *heads), torch.randn(heads))][: 1 + has_bias]

    def op(projection: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        return qkv_mrope(projection, cos, sin, bias=bias)

    def reference_op(projection: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        return reference.qkv_mrope(projection, *to_float64(cos, sin), bias=bias)

    exact = to_float64(*inputs)
    for actual, expected in zip(op(*inputs), reference_op(*exact), strict=True):
        assert actual.dtype == dtype
        assert_accurate(actual, expected, dtype)
    for actual, expected in zip(gradients(op, inputs), gradients(reference_op, exact), strict=True):
        assert_accurate(actual, expected, dtype)


def test_joint_projection_may_be_columns_of_a_larger_tensor(device: torch.device) -> None:
    """Where ranks share key-value heads, each has the columns of one of them."""
    _, _, cos, sin = _inputs(torch.float32, device)
    wide = torch.randn(7, 3, 4, 20, device=device)
    outputs = zip(qkv_mrope(wide[:, 1:2], cos, sin), qkv_mrope(wide[:, 1:2].clone(), cos, sin), strict=True)
    assert all(torch.equal(view, copy) for view, copy in outputs)


def test_invalid_joint_projection_raises() -> None:
    projection, table = torch.zeros(7, 2, 3, 8), torch.zeros(7, 8)
    with pytest.raises(ValueError, match=r"bias must be \[2, 3, 8\], got \[6, 8\]"):
        qkv_mrope(projection, table, table, bias=torch.zeros(6, 8))
    with pytest.raises(ValueError, match="at least 3 heads"):
        qkv_mrope(projection[:, :, 1:], table, table)
