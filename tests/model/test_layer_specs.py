"""What layers keep for the backward pass; what they compute is compared with transformers in test_qwen_vl.py."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from megatron_vcr1.model.layer_specs import computed_again


def test_a_result_that_is_computed_again_is_not_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    inner, weight = (torch.randn(shape, generator=generator, requires_grad=True) for shape in ((5, 8), (3, 8)))
    F.linear(F.silu(inner), weight).square().sum().backward()
    expected = inner.grad, weight.grad
    inner.grad = weight.grad = None

    activated = F.silu(inner)
    with computed_again(activated, lambda: F.silu(inner.detach())):
        output = F.linear(activated, weight)
    activated.data.fill_(math.nan)  # a kept one would make the weight's gradient that
    output.square().sum().backward()
    torch.testing.assert_close((inner.grad, weight.grad), expected)
