"""Comparison of an op with a float64 reference, with one tolerance per dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Bound of norm(error) / norm(reference). Rounding a value to bfloat16 changes it by up to 2^-9 of itself, rounding to
# float16 by up to 2^-12; products of such values, summed in float32, have about the same relative error.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


def assert_accurate(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Assert that `actual`, computed from inputs of `dtype`, matches the float64 `expected`.

    Infinite values must be in the same places; the tolerance applies to the finite ones.
    """
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.isfinite().equal(expected.isfinite())
    actual, expected = actual[actual.isfinite()], expected[expected.isfinite()]
    error, size = (actual - expected).norm(), expected.norm()
    assert error <= TOLERANCE[dtype] * size + 1e-30, f"relative error {error / size:.2e}, |reference| {size:.2e}"


def gradients(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradients of a random projection of the outputs, which is the same for every dtype and device."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    projections = [torch.randn(output.shape, generator=generator, dtype=torch.float64) for output in outputs]
    grad_outputs = [
        projection.to(output.device, output.dtype) for projection, output in zip(projections, outputs, strict=True)
    ]
    return torch.autograd.grad(outputs, inputs, grad_outputs)


def to_float64(*tensors: Tensor) -> list[Tensor]:
    """Return copies of the tensors on the CPU in float64."""
    return [tensor.detach().double().cpu() for tensor in tensors]
