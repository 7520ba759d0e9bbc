"""Attention over packed sequences, for the language model and the vision tower.

`PackedAttention` is the core attention of megatron-core's layers. It calls `vcr1_kernels.shared_prefix_attention`. The
language model packs tokens, the vision tower packs patches; this module calls both tokens.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor
from vcr1_kernels import SegmentLayout, mrope, shared_prefix_attention

from megatron_vcr1.model.layer_features import LayerFeatures
from megatron_vcr1.parallel.context import KeyGather, gather_keys, regather_in_backward


class CachedAttention(Protocol):
    """Attention of generation, which stores keys and values between forward passes (`model.kv_cache`)."""

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Store the keys and values of one layer and return the attention output.

        Args:
            layer_number: megatron-core's number of the layer: 1-based, counted over all pipeline stages.
            query: [tokens, heads, head_dim], with rotary positions.
            key: [tokens, kv_heads, head_dim], with rotary positions.
            value: [tokens, kv_heads, head_dim].
            scale: factor of the scores; None for head_dim ** -0.5.

        Returns:
            [tokens, heads, head_dim].
        """
        ...


@dataclass(frozen=True, slots=True)
class RotaryTables:
    """RoPE tables: cosine and sine of the rotary angles, computed once and shared by all layers."""

    cos: Tensor  # float32 [tokens, head_dim]
    sin: Tensor  # float32 [tokens, head_dim]

    @classmethod
    def from_angles(cls, angles: Tensor, factor: float = 1.0) -> RotaryTables:
        """Compute the tables of rotary angles, [tokens, head_dim], times a factor (YaRN's)."""
        cos, sin = angles.cos(), angles.sin()
        return cls(cos, sin) if factor == 1 else cls(factor * cos, factor * sin)


@dataclass
class AttentionLayout(PackedSeqParams):
    """The arguments of attention that megatron-core passes to every layer as ``packed_seq_params``.

    A layer that was built with windowed attention attends within `windows`, any other layer within `full`. Only the
    vision tower of Qwen2.5-VL has windows. In generation, `cached` replaces both.

    Under context parallelism, the queries are those of this rank's tokens, and `keys` is the plan by which the
    context-parallel ranks gather the keys and values that `full` describes.

    `features` are added to the outputs of the first language layers (`layer_specs.FeatureAddingLayer`).

    `selected` is read by the last layer of the language model (`layer_specs.TokenSelectingLayer`): after its attention,
    only these tokens are computed further.
    """

    qkv_format: str = "sbhd"  # hidden states are [tokens, 1, hidden_size]: one packed sequence is a batch of one
    rope: RotaryTables | None = None
    full: SegmentLayout | None = None
    windows: SegmentLayout | None = None
    cached: CachedAttention | None = None
    keys: KeyGather | None = None
    features: LayerFeatures | None = None
    selected: Tensor | None = None  # int64 [selected tokens]; None selects all

    def select(self, x: Tensor) -> Tensor:
        """Return the selected tokens of x: [tokens, ...] -> [selected tokens, ...]."""
        return x if self.selected is None else x.index_select(0, self.selected)


class PackedAttention(MegatronModule):
    """The core attention of a megatron-core SelfAttention, over the segments of an `AttentionLayout`.

    It applies the rotary positions itself, so SelfAttention is built without a position embedding.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *args: Any,
        windowed_layers: frozenset[int] = frozenset(),
        selects_tokens: bool = False,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the arguments of megatron-core's DotProductAttention, and two more.

        Args:
            config: the tower's configuration.
            layer_number: 1-based number of the layer.
            windowed_layers: 1-based numbers of the layers with windowed attention.
            selects_tokens: whether to return the selected tokens only.
            softmax_scale: factor of the scores; None for head_dim ** -0.5.
        """
        super().__init__(config=config)
        self.selects_tokens = selects_tokens
        self.layer_number = layer_number
        self.windowed = layer_number in windowed_layers
        self.softmax_scale = softmax_scale
        self.is_recomputed = config.recompute_granularity == "full" or (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        *args: Any,
        packed_seq_params: AttentionLayout | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Apply the rotary positions and attend.

        Args:
            query: [tokens, 1, heads, head_dim], without positions.
            key: [tokens, 1, kv_heads, head_dim], without positions.
            value: [tokens, 1, kv_heads, head_dim].
            attention_mask: ignored; the layout replaces it.
            packed_seq_params: the layout, with RoPE tables.

        Returns:
            [tokens, 1, heads * head_dim]; of the selected tokens only, if this layer selects tokens.
        """
        if packed_seq_params is None or packed_seq_params.rope is None:
            raise ValueError("PackedAttention needs an AttentionLayout with RoPE tables as packed_seq_params")
        rope = packed_seq_params.rope
        query, key = mrope(query.squeeze(1), key.squeeze(1), rope.cos, rope.sin, inplace=False)
        # `value` is a view of the joint query-key-value projection. Saving the view for backward would keep the whole
        # projection in memory, so a copy is saved instead.
        value = value.squeeze(1).contiguous()
        if packed_seq_params.cached is not None:
            output = packed_seq_params.cached.attend(self.layer_number, query, key, value, self.softmax_scale)
        else:
            layout = packed_seq_params.windows if self.windowed else packed_seq_params.full
            assert layout is not None, "the AttentionLayout has no segments for this layer"
            if packed_seq_params.keys is None:
                output = shared_prefix_attention(query, key, value, layout, scale=self.softmax_scale)
            else:
                output = self._attend_across_ranks(query, key, value, layout, packed_seq_params.keys)
        if self.selects_tokens:
            output = packed_seq_params.select(output)
        return output.flatten(1).unsqueeze(1)

    def _attend_across_ranks(
        self, query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, plan: KeyGather
    ) -> Tensor:
        """Gather the keys and values of all context-parallel ranks' prompt tokens, and attend to them.

        Args:
            query: [tokens, heads, head_dim], of this rank's tokens; key and value have kv_heads.
            layout: segments of the gathered keys, with the ranges that have a query on this rank.
            plan: how the keys are gathered.
        """
        local = torch.cat((key, value), dim=1)  # one collective for both
        gathered = gather_keys(local, plan)
        # If attention is recomputed, the recomputation gathers the keys, and they live until its backward pass only.
        regathers = (
            nullcontext()
            if self.is_recomputed
            else regather_in_backward(gathered, lambda: gather_keys(local.detach(), plan))
        )
        with regathers:
            keys, values = gathered.chunk(2, dim=1)
            return shared_prefix_attention(query, keys, values, layout, scale=self.softmax_scale)
