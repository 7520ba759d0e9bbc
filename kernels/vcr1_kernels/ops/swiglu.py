"""SwiGLU on the packed output of a fused gate-and-up projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vcr1_kernels import reference
from vcr1_kernels.backend import use_triton
from vcr1_kernels.checks import require_contiguous_rows, require_floating


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, in Megatron's layout: the last dimension holds all of gate, then all of up.

    Args:
        gate_up: [..., 2 * ffn_size], computed in float32 internally.

    Returns:
        [..., ffn_size] in the input's dtype.

    Raises:
        ValueError: an odd or non-contiguous last dimension.
    """
    require_floating("gate_up", gate_up)
    require_contiguous_rows("gate_up", gate_up)
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"the last dimension of gate_up must hold two equal halves, got {list(gate_up.shape)}")
    if use_triton(gate_up) and gate_up.numel():
        return _TritonSwiglu.apply(gate_up)
    return reference.swiglu(gate_up)


class _TritonSwiglu(torch.autograd.Function):
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
