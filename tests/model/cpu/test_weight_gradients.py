from __future__ import annotations

import megatron.core.tensor_parallel.layers as layers
import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_are_added_to_their_buffer(dtype: torch.dtype) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    x, grad_output = (torch.randn(64, size, generator=generator).to(device, dtype) for size in (32, 16))
    buffer = torch.ones(16, 32, device=device)
    layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(x, grad_output, buffer)
    expected = 1 + grad_output.double().T @ x.double()
    tolerance = 1e-4 if dtype == torch.float32 or device == "cuda" else 0.1
    torch.testing.assert_close(buffer.double(), expected, atol=tolerance, rtol=0)
