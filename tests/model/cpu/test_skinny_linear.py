"""skinny_linear against float64."""

from __future__ import annotations

import pytest
import torch

from megatron_vcr1.model.cpu.skinny_linear import skinny_linear


@pytest.mark.parametrize("num_rows", [1, 3, 8, 12, 13])
@pytest.mark.parametrize("num_features", [64, 40])  # 40 is not a multiple of the block size
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_matches_a_float64_matmul(num_rows: int, num_features: int, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((num_rows, 24), (num_features, 24)))
    output = skinny_linear(x, weight)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), x.double() @ weight.double().T, atol=tolerance, rtol=0)
