from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from vcr1_kernels import reference, rms_norm

from tests.kernels.accuracy import assert_accurate, gradients, to_float64

EPSILON = 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2), (3, 1023), (2, 5, 1100), (0, 8)])
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    x, weight = (3 * torch.randn(shape)).to(device, dtype), torch.randn(shape[-1:]).to(device, dtype)
    output = rms_norm(x, weight, EPSILON)
    assert output.dtype == dtype
    assert_accurate(output, reference.rms_norm(*to_float64(x, weight), EPSILON), dtype)
    ours = gradients(lambda *inputs: rms_norm(*inputs, EPSILON), [x, weight])
    expected = gradients(lambda *inputs: reference.rms_norm(*inputs, EPSILON), to_float64(x, weight))
    for ours_grad, expected_grad in zip(ours, expected, strict=True):
        assert_accurate(ours_grad, expected_grad, dtype)


def test_matches_torch(device: torch.device) -> None:
    x, weight = torch.randn(7, 64, device=device), torch.randn(64, device=device)
    torch.testing.assert_close(rms_norm(x, weight, 1e-2), F.rms_norm(x, (64,), weight, 1e-2))


def test_result_has_the_dtype_of_the_input(device: torch.device) -> None:
    x, weight = torch.randn(3, 8, device=device), torch.randn(8, device=device)
    for dtypes in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        assert rms_norm(x.to(dtypes[0]), weight.to(dtypes[1]), EPSILON).dtype == dtypes[0]


def test_zero_input_gives_zero_output_and_finite_gradient(device: torch.device) -> None:
    x = torch.zeros(2, 8, device=device, requires_grad=True)
    output = rms_norm(x, torch.ones(8, device=device), EPSILON)
    output.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert output.eq(0).all()


def test_invalid_input_raises() -> None:
    with pytest.raises(ValueError, match="weight"):
        rms_norm(torch.zeros(2, 8), torch.ones(4), EPSILON)
