"""Products of few rows, in blocks or not, against float64. The step itself: tests/rollout/test_local.py."""

from __future__ import annotations

import pytest
import torch

from megatron_vcr1.model.token_step import times_transposed


@pytest.mark.parametrize("num_rows", [1, 3, 8, 12, 13])
@pytest.mark.parametrize("num_features", [64, 40])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_products(num_rows: int, num_features: int, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((num_rows, 24), (num_features, 24), (num_features,))
    rows, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    expected = rows.double() @ weight.double().T
    for added in (None, bias):
        product = times_transposed(rows, weight, added)
        assert product.dtype == dtype
        whole = expected if added is None else expected + added.double()
        torch.testing.assert_close(product.double(), whole, atol=tolerance, rtol=0)
