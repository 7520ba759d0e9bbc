"""SwiGLU of the output of a fused gate-and-up projection."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vcr1_kernels.backend import use_triton
from vcr1_kernels.checks import require_contiguous_last_dim, require_floating


def swiglu(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up (arXiv:2002.05202) in Megatron's layout, in float32 internally.

    Args:
        gate_up: [..., 2 * ffn_size]; the first half of the last dimension is gate, the second half is up.

    Returns:
        [..., ffn_size] in the dtype of the input.

    Raises:
        ValueError: the last dimension is odd or not contiguous.
    """
    require_floating("gate_up", gate_up)
    require_contiguous_last_dim("gate_up", gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"the last dimension of gate_up must hold two equal halves, got {list(gate_up.shape)}")
    if use_triton(gate_up) and gate_up.numel():
        return _TritonSwiglu.apply(gate_up)
    return _TorchSwiglu.apply(gate_up)


class _TorchSwiglu(torch.autograd.Function):
    """Saves only its input; autograd would also save silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
        return F.silu(gate).mul_(up).to(gate_up.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        compute_dtype = torch.promote_types(gate_up.dtype, torch.float32)
        gate, up = gate_up.to(compute_dtype).chunk(2, dim=-1)
        grad_output = grad_output.to(compute_dtype)
        grad = torch.empty(gate_up.shape, dtype=compute_dtype, device=gate_up.device)
        grad_gate, grad_up = grad.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad_output * up, gate, grad_input=grad_gate)
        torch.mul(F.silu(gate), grad_output, out=grad_up)
        return grad.to(gate_up.dtype)


class _TritonSwiglu(torch.autograd.Function):
    """Runs one kernel in each direction and saves only its input."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        from vcr1_kernels.triton_ops.swiglu import launch_swiglu

        ctx.save_for_backward(gate_up)
        return launch_swiglu(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        from vcr1_kernels.triton_ops.swiglu import launch_swiglu_backward

        (gate_up,) = ctx.saved_tensors
        return launch_swiglu_backward(gate_up, grad_output)
