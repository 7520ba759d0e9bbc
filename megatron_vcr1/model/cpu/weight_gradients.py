"""The function that adds a linear layer's weight gradient to its gradient buffer, where Apex's extension is missing."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor


def add_weight_gradient(x: Tensor, grad_output: Tensor, weight_grad: Tensor) -> None:
    """Add grad_output.T @ x to a gradient buffer in one matmul.

    Args:
        x: the layer's input, [tokens, in_features].
        grad_output: the gradient of its output, [tokens, out_features].
        weight_grad: [out_features, in_features]; may have a higher precision than the matrices. cuBLAS adds in that
            precision, without rounding the product. The CPU rounds it first.
    """
    if x.dtype == weight_grad.dtype:
        weight_grad.addmm_(grad_output.t(), x)
    elif weight_grad.is_cuda:
        torch.ops.aten.addmm.dtype_out(weight_grad, grad_output.t(), x, weight_grad.dtype, out=weight_grad)
    else:
        weight_grad.add_(grad_output.t() @ x)


def install() -> None:
    """Make megatron-core's linear layers use `add_weight_gradient` if Apex's extension is not installed."""
    import megatron.core.tensor_parallel.layers as layers

    if not layers._grad_accum_fusion_available:
        layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(
            wgrad_gemm_accum_fp32=add_weight_gradient,  # into float32 buffers
            wgrad_gemm_accum_fp16=add_weight_gradient,  # into bfloat16 buffers
        )
        layers._grad_accum_fusion_available = True
