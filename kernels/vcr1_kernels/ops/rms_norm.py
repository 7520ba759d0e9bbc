"""RMSNorm: on the CPU with one saved copy of its input and a short backward; torch's own kernel on a GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vcr1_kernels.checks import require_floating, require_shape


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension (arXiv:1910.07467), in float32 internally.

    On the CPU torch composes it of elementwise operators, which keep the normalised input beside the input and go over
    memory a dozen times in backward.

    Args:
        x: [..., hidden_size].
        weight: [hidden_size].

    Returns:
        x's shape and dtype.

    Raises:
        ValueError: the shapes do not fit.
    """
    require_floating("x", x)
    require_shape("weight", weight, x.shape[-1])
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, epsilon)
    return _RmsNorm.apply(x, weight, epsilon)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        compute_dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(compute_dtype)
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse_rms = mean_square.add_(epsilon).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, inverse_rms)
        return (wide * inverse_rms).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        normalised = x.to(inverse_rms.dtype) * inverse_rms
        grad = grad_output.to(inverse_rms.dtype)
        product = grad * normalised
        grad_weight = product.flatten(0, -2).sum(0)
        along = (
            (product @ weight.to(product.dtype)).div_(x.shape[-1]).unsqueeze(-1)
        )  # mean of grad * weight * normalised
        grad_x = (grad * weight).addcmul_(normalised, along, value=-1).mul_(inverse_rms)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None
