"""The gradients of features that layers add, with and without recomputation, against plain autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_vcr1.model.layer_features import LayerFeatures

INDICES = torch.tensor([1, 3, 4])


def _tensors() -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 1, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    source = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(4, 4, generator=generator, dtype=torch.float64) for _ in range(4)]
    return hidden, source, weights


def _features(source: Tensor) -> Tensor:
    return torch.stack([source.sin(), source.exp()])  # of two layers, and both depend on one tensor


def _expected() -> list[Tensor]:
    hidden, source, weights = _tensors()
    x, features = hidden, _features(source)
    for layer, weight in enumerate(weights):
        x = (x @ weight).tanh()
        if layer in (1, 2):
            x = x.index_add(0, INDICES, features[layer - 1][:, None])
    x.square().sum().backward()
    return [hidden.grad, source.grad]


def _recomputed(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(layer, x, use_reentrant=True)


@pytest.mark.parametrize("run", [lambda layer, x: layer(x), _recomputed], ids=["saved", "recomputed"])
@pytest.mark.parametrize("num_stages", [1, 2])
def test_gradients_equal_autograd(run: Callable[..., Tensor], num_stages: int) -> None:
    hidden, source, weights = _tensors()
    x, features = hidden, _features(source)
    first = LayerFeatures(features, INDICES, first_layer=2)  # layers are counted from 1
    x, current = first.attach(x), first
    for number, weight in enumerate(weights, 1):
        if number == 3 and num_stages == 2:  # the next stage gets the features that are left
            sent = first.append_to(x, 2)
            assert sent.shape == (6 + 3, 1, 4)
            x, current = LayerFeatures.split_off(sent, 6, INDICES, first_layer=3)
            x = current.attach(x)

        def layer(x: Tensor, weight: Tensor = weight, number: int = number, source: LayerFeatures = current) -> Tensor:
            x = (x @ weight).tanh()
            return source.add(x, number) if number >= source.first_layer else x

        x = run(layer, x)
    x.square().sum().backward()
    for gradient, expected in zip((hidden.grad, source.grad), _expected(), strict=True):
        torch.testing.assert_close(gradient, expected)


def test_layers_after_the_last_feature_are_unchanged() -> None:
    hidden, source, _ = _tensors()
    features = LayerFeatures(_features(source), INDICES, first_layer=1)
    assert features.add(hidden, 3) is hidden
    assert features.append_to(hidden, 2) is hidden
