"""Attention over packed sequences, for the language model and the vision tower.

`PackedSelfAttention` is megatron-core's self-attention, which applies the rotary positions. `PackedAttention` is its
core attention, which calls `vcr1_kernels.shared_prefix_attention`. The language model packs tokens, the vision tower
packs patches; this module calls both tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import MegatronModule, TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor
from vcr1_kernels import SegmentLayout, mrope, qkv_mrope, shared_prefix_attention

from megatron_vcr1.model.context_attention import attend_across_ranks
from megatron_vcr1.model.layer_features import LayerFeatures
from megatron_vcr1.parallel.context import KeyGather


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


class PackedSelfAttention(SelfAttention):
    """megatron-core's self-attention with the rotary positions of an `AttentionLayout`.

    Bias, rotation and the split of the joint projection are one operation, unless something must happen between them:
    the norm of each head (Qwen3-VL), or the exchange of heads between tensor-parallel ranks that share a key-value
    head.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        has_norms = any(not isinstance(norm, IdentityOp | None) for norm in (self.q_layernorm, self.k_layernorm))
        self.is_fused = not has_norms and self.config.num_query_groups >= self.world_size
        # The local layer then returns its bias. TransformerEngine's layer, which ignores this, adds it in the matmul.
        self.linear_qkv.returns_bias = self.is_fused

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: AttentionLayout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Apply self-attention; [tokens, 1, hidden_size] to the same shape, and the bias of the output projection."""
        if packed_seq_params is None or packed_seq_params.rope is None:
            raise ValueError("PackedSelfAttention needs an AttentionLayout with RoPE tables as packed_seq_params")
        # megatron-core hands its argument `key_value_states`, which only cross-attention uses, to the method below.
        kwargs["key_value_states"] = packed_seq_params.rope
        return super().forward(hidden_states, attention_mask, packed_seq_params=packed_seq_params, **kwargs)

    def get_query_key_value_tensors(
        self, hidden_states: Tensor, key_value_states: RotaryTables, **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries and keys, with their rotary positions, and values; [tokens, 1, heads, head_dim]."""
        cos, sin = key_value_states.cos, key_value_states.sin
        if self.is_fused:
            projection, bias = self.linear_qkv(hidden_states)
            heads = (self.num_query_groups_per_partition, -1, self.hidden_size_per_attention_head)
            bias = None if bias is None else bias.view(heads)
            query, key, value = qkv_mrope(projection.view(len(projection), *heads), cos, sin, bias=bias)
        else:
            query, key, value = (x.squeeze(1) for x in super().get_query_key_value_tensors(hidden_states, **kwargs))
            query, key = mrope(query, key, cos, sin, inplace=False)
            # `value` is a view of the projection. If attention saved it, the whole projection would stay in memory.
            value = value.contiguous()
        return query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)


class PackedAttention(MegatronModule):
    """The core attention of `PackedSelfAttention`, over the segments of an `AttentionLayout`."""

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
        """Attend.

        Args:
            query: [tokens, 1, heads, head_dim], with rotary positions.
            key: [tokens, 1, kv_heads, head_dim], with rotary positions.
            value: [tokens, 1, kv_heads, head_dim].
            attention_mask: ignored; the layout replaces it.
            packed_seq_params: the layout.

        Returns:
            [tokens, 1, heads * head_dim]; of the selected tokens only, if this layer selects tokens.
        """
        assert packed_seq_params is not None
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if packed_seq_params.cached is not None:
            output = packed_seq_params.cached.attend(self.layer_number, query, key, value, self.softmax_scale)
        else:
            layout = packed_seq_params.windows if self.windowed else packed_seq_params.full
            assert layout is not None, "the AttentionLayout has no segments for this layer"
            if packed_seq_params.keys is None:
                output = shared_prefix_attention(query, key, value, layout, scale=self.softmax_scale)
            else:
                output = attend_across_ranks(
                    query,
                    key,
                    value,
                    layout,
                    packed_seq_params.keys,
                    scale=self.softmax_scale,
                    keeps_gathered=self.is_recomputed,  # then they live until the backward pass of this layer only
                )
        if self.selects_tokens:
            output = packed_seq_params.select(output)
        return output.flatten(1).unsqueeze(1)
