from __future__ import annotations

import pytest
import torch
from vcr1_kernels import reference, swiglu

from tests.kernels.accuracy import assert_accurate, gradients, to_float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 2), (3, 2046), (2, 5, 2 * 1100), (16,), (0, 8)])
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    gate_up = (3 * torch.randn(shape)).to(device, dtype)
    bias = torch.randn(shape[-1:]).to(device, dtype)
    for inputs in ([gate_up], [gate_up, bias]):
        output = swiglu(*inputs)
        assert output.dtype == dtype
        exact = to_float64(*inputs)
        assert_accurate(output, reference.swiglu(*exact), dtype)
        for actual, expected in zip(gradients(swiglu, inputs), gradients(reference.swiglu, exact), strict=True):
            assert actual.dtype == dtype
            assert_accurate(actual, expected, dtype)


def test_first_half_is_the_gate(device: torch.device) -> None:
    output = swiglu(torch.tensor([[0.0, 100.0, 5.0, 7.0]], device=device))
    torch.testing.assert_close(output.cpu(), torch.tensor([[0.0, 700.0]]))


def test_input_may_be_columns_of_a_larger_tensor(device: torch.device) -> None:
    wide = torch.randn(5, 30, device=device)
    torch.testing.assert_close(swiglu(wide[:, 4:24]), swiglu(wide[:, 4:24].contiguous()))


def test_invalid_input_raises() -> None:
    with pytest.raises(ValueError, match="two equal halves"):
        swiglu(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"bias must be \[4\], got \[2\]"):
        swiglu(torch.zeros(2, 4), torch.zeros(2))
    with pytest.raises(ValueError, match="must be contiguous"):
        swiglu(torch.zeros(4, 2).t())
