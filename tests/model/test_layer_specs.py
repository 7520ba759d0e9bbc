"""The tensors that layers save for backward; test_video_language_model.py compares their results."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.model.layer_specs import LayerNormColumnParallelLinear, recompute_in_backward
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.megatron_compat import no_cuda_graphs


def test_a_recomputed_tensor_is_not_saved_for_backward() -> None:
    generator = torch.Generator().manual_seed(0)
    inner, weight = (torch.randn(shape, generator=generator, requires_grad=True) for shape in ((5, 8), (3, 8)))
    F.linear(F.silu(inner), weight).square().sum().backward()
    expected = inner.grad, weight.grad
    inner.grad = weight.grad = None

    activated = F.silu(inner)
    with recompute_in_backward(activated, lambda: F.silu(inner.detach())):
        output = F.linear(activated, weight)
    activated.data.fill_(math.nan)  # a saved tensor would make the weight's gradient NaN
    output.square().sum().backward()
    torch.testing.assert_close((inner.grad, weight.grad), expected)


@pytest.fixture
def world() -> Iterator[None]:
    with mesh.world(ParallelSection()):
        yield


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_the_norm_before_a_linear_layer_is_recomputed_in_backward(
    monkeypatch: pytest.MonkeyPatch, world: None, normalization: str
) -> None:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        normalization=normalization,
        layernorm_epsilon=1e-3,
        use_cpu_initialization=True,
        **no_cuda_graphs(),
    )
    linear = LayerNormColumnParallelLinear(8, 6, config=config, init_method=torch.nn.init.normal_)
    for parameter in linear.parameters():
        parameter.data += torch.linspace(-0.5, 1, parameter.numel()).view(parameter.shape)
    x = torch.randn(5, 1, 8, requires_grad=True)

    def reference(x: Tensor) -> Tensor:
        if normalization == "RMSNorm":
            normalized = F.rms_norm(x, (8,), linear.layer_norm_weight, 1e-3)
        else:
            normalized = F.layer_norm(x, (8,), linear.layer_norm_weight, linear.layer_norm_bias, 1e-3)
        return F.linear(normalized, linear.weight, linear.bias)

    leaves = [x, *linear.parameters()]
    expected = torch.autograd.grad(reference(x).square().sum(), leaves)
    inputs: list[Tensor] = []
    normalize = LayerNormColumnParallelLinear.normalize

    def counted(self: LayerNormColumnParallelLinear, x: Tensor) -> Tensor:
        inputs.append(x)
        return normalize(self, x)

    monkeypatch.setattr(LayerNormColumnParallelLinear, "normalize", counted)
    output, bias = linear(x)
    assert bias is None and len(inputs) == 1
    torch.testing.assert_close(torch.autograd.grad(output.square().sum(), leaves), expected)
    assert len(inputs) == 2
    linear.returns_bias = True
    output, bias = linear(x)
    assert bias is linear.bias
    torch.testing.assert_close(output + bias, reference(x))
