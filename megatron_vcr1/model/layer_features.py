"""Vision features that the first language layers add to the hidden states of vision tokens (DeepStack)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LayerFeatures:
    """The features of one microbatch that the layers of one pipeline stage, and of the stages after it, add.

    A layer gets them through its `AttentionLayout`, not as an argument. Full recomputation runs the layer again in a
    backward pass of its own, which would continue into the vision tower once for every layer, and fail the second time.
    Therefore `add` detaches the features and stores their gradient here, and `attach`, which is before the layers in
    the forward pass and so after them in the backward pass, returns the gradients of all layers at once.
    """

    def __init__(self, features: Tensor, token_indices: Tensor, first_layer: int) -> None:
        """Collect the features.

        Args:
            features: [layers, vision tokens, hidden_size], for consecutive layers.
            token_indices: int64 [vision tokens]: the tokens that the features belong to.
            first_layer: megatron-core's number of the first of these layers (1-based).
        """
        self.features = features
        self.token_indices = token_indices
        self.first_layer = first_layer
        self._gradient: Tensor | None = None

    @classmethod
    def split_off(
        cls, received: Tensor, num_tokens: int, token_indices: Tensor, first_layer: int
    ) -> tuple[Tensor, LayerFeatures]:
        """Take the features off the hidden states that `append_to` has appended them to.

        Args:
            received: [num_tokens + layers * vision tokens, 1, hidden_size].
            num_tokens: number of tokens.
            token_indices, first_layer: as for LayerFeatures.

        Returns:
            The hidden states, [num_tokens, 1, hidden_size], and the features.
        """
        hidden, features = received.tensor_split((num_tokens,))
        return hidden, cls(features.view(-1, len(token_indices), features.shape[-1]), token_indices, first_layer)

    def append_to(self, hidden: Tensor, last_layer: int) -> Tensor:
        """Append the features of the layers after `last_layer`, the stage's last, to its output."""
        after = self.features[last_layer + 1 - self.first_layer :]
        return torch.cat((hidden, after.flatten(0, 1)[:, None])) if len(after) else hidden

    def attach(self, hidden: Tensor) -> Tensor:
        """Return the input of the stage's first layer, [tokens, 1, hidden_size], so that gradients reach the features.

        Call it once, before the layers.
        """
        return _Attach.apply(hidden, self.features, self)

    def add(self, hidden: Tensor, layer_number: int) -> Tensor:
        """Add the features of a layer to its output, [tokens, 1, hidden_size]; returns it unchanged after the last."""
        index = layer_number - self.first_layer
        return _Add.apply(hidden, self, index) if index < len(self.features) else hidden

    def store_gradient(self, index: int, gradient: Tensor) -> None:
        """Store the gradient of one layer's features, [vision tokens, hidden_size]."""
        if self._gradient is None:
            self._gradient = torch.zeros_like(self.features)
        self._gradient[index] = gradient

    def take_gradient(self) -> Tensor:
        """Return the gradient of all features that `add` has stored, and forget it."""
        gradient, self._gradient = self._gradient, None
        return torch.zeros_like(self.features) if gradient is None else gradient


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, source: LayerFeatures, index: int) -> Tensor:
        ctx.source, ctx.index = source, index
        return hidden.index_add(0, source.token_indices, source.features.detach()[index][:, None])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.source.store_gradient(ctx.index, gradient.index_select(0, ctx.source.token_indices)[:, 0])
        return gradient, None, None


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, features: Tensor, source: LayerFeatures) -> Tensor:
        ctx.source = source
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, ctx.source.take_gradient(), None
