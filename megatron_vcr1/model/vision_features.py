"""Vision features: the output of the vision tower, on its way to the language model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """The output of the vision tower."""

    embeddings: Tensor
    """[vision tokens, hidden_size]: they replace the embeddings of the pads."""
    layers: Tensor | None = None
    """[layers, vision tokens, hidden_size]: the first language layers add them to their outputs."""

    def to(self, dtype: torch.dtype) -> VisionFeatures:
        """Return the features in a dtype."""
        return VisionFeatures(self.embeddings.to(dtype), None if self.layers is None else self.layers.to(dtype))

    def join(self) -> Tensor:
        """Return all features of each token as one vector, [vision tokens, (1 + layers) * hidden_size]."""
        if self.layers is None:
            return self.embeddings
        return torch.cat((self.embeddings, self.layers.transpose(0, 1).flatten(1)), dim=1)

    @classmethod
    def split(cls, joined: Tensor, hidden_size: int) -> VisionFeatures:
        """Return the features that `join` has joined."""
        embeddings, layers = joined[:, :hidden_size], joined[:, hidden_size:]
        if not layers.shape[1]:
            return cls(embeddings)
        return cls(embeddings, layers.unflatten(1, (-1, hidden_size)).transpose(0, 1))

    def reordered(self, order: Tensor) -> VisionFeatures:
        """Return the features with token order[i] as the i-th."""
        layers = None if self.layers is None else self.layers.index_select(1, order)
        return VisionFeatures(self.embeddings.index_select(0, order), layers)


@dataclass(slots=True)
class FeatureMemo:
    """The vision features of a microbatch of which several forward passes are computed.

    The model stores the features of the first pass here, and the later passes use them. This is only correct if the
    vision tower and the merger are frozen, so that all passes have the same features and none needs their gradient.
    """

    features: VisionFeatures | None = None
    """The features of this rank's vision tokens; None before the first pass, and without images and videos."""


def with_zero_gradients(x: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return `x`, and make its backward pass give a gradient of zero to parameters that `x` does not depend on.

    A microbatch of text alone does not call the vision tower. Its loss must still have a gradient if only the tower is
    trained, and every parameter must get one for DDP to reduce its bucket during the backward pass.
    """
    return _ZeroGradients.apply(x, *(parameter for parameter in parameters if parameter.requires_grad))


class _ZeroGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: nn.Parameter) -> Tensor:
        ctx.parameters = parameters  # for their shapes only
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *(p.new_zeros(()).expand_as(p) for p in ctx.parameters)
