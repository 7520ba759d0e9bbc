"""SwiGLU of the output of a fused gate-and-up projection."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vcr1_kernels.backend import use_triton
from vcr1_kernels.checks import require_contiguous_last_dim, require_floating, require_shape


def swiglu(gate_up: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute silu(gate) * up (arXiv:2002.05202) in Megatron's layout, in float32 internally.

    Args:
        gate_up: [..., 2 * ffn_size]; the first half of the last dimension is gate, the second half is up.
        bias: added to gate_up before anything else, [2 * ffn_size].

    Returns:
        [..., ffn_size] in the dtype of the input.

    Raises:
        ValueError: the last dimension is odd or not contiguous.
    """
    require_floating("gate_up", gate_up)
    require_contiguous_last_dim("gate_up", gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"the last dimension of gate_up must hold two equal halves, got {list(gate_up.shape)}")
    if bias is not None:
        require_shape("bias", bias, gate_up.shape[-1])
        require_contiguous_last_dim("bias", bias)
    if use_triton(gate_up) and gate_up.numel():
        return _TritonSwiglu.apply(gate_up, bias)
    return _TorchSwiglu.apply(gate_up, bias)


class _TorchSwiglu(torch.autograd.Function):
    """Saves only its inputs; autograd would also save silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, bias)
        gate, up = _float_halves(gate_up, bias)
        return F.silu(gate).mul_(up).to(gate_up.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up, bias = ctx.saved_tensors
        gate, up = _float_halves(gate_up, bias)
        grad_output = grad_output.to(gate.dtype)
        grad = torch.empty(gate_up.shape, dtype=gate.dtype, device=gate_up.device)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad_output * up, gate, grad_input=grad_gate)
        torch.mul(F.silu(gate), grad_output, out=grad_up)
        grad = grad.to(gate_up.dtype)
        return grad, _bias_gradient(grad, bias) if ctx.needs_input_grad[1] else None


def _float_halves(gate_up: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return gate and up in float32 (float64 for float64), with their biases."""
    gate_up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32))
    gate, up = (gate_up if bias is None else gate_up + bias).chunk(2, dim=-1)
    return gate, up


def _bias_gradient(grad: Tensor, bias: Tensor) -> Tensor:
    return grad.reshape(-1, len(bias)).sum(0, dtype=bias.dtype)


class _TritonSwiglu(torch.autograd.Function):
    """Runs one kernel in each direction and saves only its inputs."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, bias: Tensor | None) -> Tensor:
        from vcr1_kernels.triton_ops.swiglu import launch_swiglu

        ctx.save_for_backward(gate_up, bias)
        return launch_swiglu(gate_up, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor | None]:
        from vcr1_kernels.triton_ops.swiglu import launch_swiglu_backward

        gate_up, bias = ctx.saved_tensors
        grad = launch_swiglu_backward(gate_up, bias, grad_output)
        return grad, _bias_gradient(grad, bias) if ctx.needs_input_grad[1] else None
