"""Triton path of `vcr1_kernels.ops.swiglu`: one kernel in each direction, in float32 internally."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcr1_kernels.backend import on_its_gpu
from vcr1_kernels.triton_ops import FUSED

_BLOCK = 1024


@triton.jit
def _load_gate_and_up(gate_ptr, bias_ptr, columns, ffn_size, HAS_BIAS: tl.constexpr):
    """Load gate and up of one row as float32 and add their biases."""
    inside = columns < ffn_size
    gate = tl.load(gate_ptr + columns, mask=inside).to(tl.float32)
    up = tl.load(gate_ptr + columns + ffn_size, mask=inside).to(tl.float32)
    if HAS_BIAS:
        gate += tl.load(bias_ptr + columns, mask=inside).to(tl.float32)
        up += tl.load(bias_ptr + columns + ffn_size, mask=inside).to(tl.float32)
    return gate, up


@triton.jit
def _swiglu_kernel(
    gate_up_ptr, bias_ptr, out_ptr, row_stride, ffn_size, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Compute out = silu(gate) * up with silu(x) = x sigmoid(x). Grid: (rows, column blocks)."""
    row = tl.program_id(0).to(tl.int64)  # 64 bits: row * stride can exceed 2^31
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < ffn_size
    gate, up = _load_gate_and_up(gate_up_ptr + row * row_stride, bias_ptr, columns, ffn_size, HAS_BIAS)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * ffn_size + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward_kernel(
    gate_up_ptr, bias_ptr, grad_out_ptr, grad_ptr, gate_up_row_stride, ffn_size,
    HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute d gate = d out * up * silu'(gate) and d up = d out * silu(gate). Grid: (rows, column blocks).

    silu'(x) = sigmoid(x) + silu(x) (1 - sigmoid(x)). sigmoid and silu are recomputed from the input, which costs less
    than storing them.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < ffn_size
    gate, up = _load_gate_and_up(gate_up_ptr + row * gate_up_row_stride, bias_ptr, columns, ffn_size, HAS_BIAS)
    grad_out = tl.load(grad_out_ptr + row * ffn_size + columns, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate = grad_out * up * (sigmoid + silu * (1 - sigmoid))
    grad_gate_ptr = grad_ptr + row * 2 * ffn_size + columns
    tl.store(grad_gate_ptr, grad_gate.to(grad_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_gate_ptr + ffn_size, (grad_out * silu).to(grad_ptr.dtype.element_ty), mask=inside)


@on_its_gpu
def launch_swiglu(gate_up: Tensor, bias: Tensor | None) -> Tensor:
    """Return silu(gate) * up, [..., ffn_size], of [..., gate | up] plus the bias."""
    rows = gate_up.reshape(-1, gate_up.shape[-1])
    ffn_size = gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], ffn_size, dtype=gate_up.dtype, device=gate_up.device)
    _swiglu_kernel[(len(rows), triton.cdiv(ffn_size, _BLOCK))](
        rows, bias, out, rows.stride(0), ffn_size, HAS_BIAS=bias is not None, BLOCK=_BLOCK, **FUSED
    )
    return out


@on_its_gpu
def launch_swiglu_backward(gate_up: Tensor, bias: Tensor | None, grad_out: Tensor) -> Tensor:
    """Return the gradient of `gate_up`, [..., gate | up], given the gradient of the output, [..., ffn_size]."""
    rows = gate_up.reshape(-1, gate_up.shape[-1])
    ffn_size = gate_up.shape[-1] // 2
    grad = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    _swiglu_backward_kernel[(len(rows), triton.cdiv(ffn_size, _BLOCK))](
        rows,
        bias,
        grad_out.contiguous(),
        grad,
        rows.stride(0),
        ffn_size,
        HAS_BIAS=bias is not None,
        BLOCK=_BLOCK,
        **FUSED,
    )
    return grad
