"""RMSNorm: an autograd function with little memory traffic on the CPU, torch's own kernel on a GPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vcr1_kernels.checks import require_floating, require_shape


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Compute x / sqrt(mean(x^2) + epsilon) * weight over the last dimension (arXiv:1910.07467), in float32 internally.

    On the CPU, torch composes RMSNorm from elementwise operators, which save the normalized input in addition to the
    input and make about a dozen passes over memory in backward. This op saves the input and one number per vector.

    Args:
        x: [..., hidden_size].
        weight: [hidden_size].
        epsilon: added to the mean square.

    Returns:
        A tensor with x's shape and dtype.

    Raises:
        ValueError: x is not floating-point, or weight is not [hidden_size].
    """
    require_floating("x", x)
    require_shape("weight", weight, x.shape[-1])
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, epsilon).to(x.dtype)  # torch promotes the two dtypes
    return _RmsNorm.apply(x, weight, epsilon)


class _RmsNorm(torch.autograd.Function):
    """Saves its inputs and the inverse root mean square of each vector."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        compute_dtype = torch.promote_types(x.dtype, torch.float32)
        x_float = x.to(compute_dtype)
        mean_square = torch.linalg.vector_norm(x_float, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse_rms = mean_square.add_(epsilon).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, inverse_rms)
        return (x_float * inverse_rms).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, None]:
        # With n = x * inverse_rms and g = grad_output:
        # grad_weight = sum(g * n), grad_x = inverse_rms * (g * weight - n * mean(g * weight * n)).
        x, weight, inverse_rms = ctx.saved_tensors
        normalized = x.to(inverse_rms.dtype) * inverse_rms
        grad = grad_output.to(inverse_rms.dtype)
        grad_normalized = grad * normalized
        grad_weight = grad_normalized.flatten(0, -2).sum(0)
        mean = (grad_normalized @ weight.to(grad.dtype)).div_(x.shape[-1]).unsqueeze(-1)
        grad_x = (grad * weight).addcmul_(normalized, mean, value=-1).mul_(inverse_rms)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None
