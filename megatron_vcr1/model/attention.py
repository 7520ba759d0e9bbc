"""The one attention of both towers: packed rows in, `vcr1_kernels.shared_prefix_attention` inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor
from vcr1_kernels import SegmentLayout, mrope, shared_prefix_attention


class CachedAttention(Protocol):
    """Attention that remembers keys and values from pass to pass (model.kv_cache)."""

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """query [rows, heads, head_dim]; key, value [rows, kv_heads, head_dim]; returns query's shape."""
        ...


@dataclass(frozen=True, slots=True)
class RotaryTables:
    """Of queries and keys by their rows' positions; taken once for all layers."""

    cos: Tensor  # [rows, head_dim]
    sin: Tensor  # [rows, head_dim]

    @classmethod
    def from_angles(cls, angles: Tensor) -> RotaryTables:
        """Of rotary angles, [rows, head_dim]."""
        return cls(angles.cos(), angles.sin())


@dataclass
class AttentionLayout(PackedSeqParams):
    """What megatron-core hands down to every layer as ``packed_seq_params``.

    A layer reads `windows` if it was built with windowed attention, else `full`. Text has no windows. In generation
    `cached` takes the place of both. A layer that was built to select rows goes on with `selected` ones behind the
    attention.
    """

    qkv_format: str = "sbhd"  # rows stay [rows, 1, heads, head_dim]: one packed sequence is one batch entry
    rope: RotaryTables | None = None
    full: SegmentLayout | None = None
    windows: SegmentLayout | None = None
    cached: CachedAttention | None = None
    selected: Tensor | None = None  # int64 [selected rows]; None: all

    def select(self, rows: Tensor) -> Tensor:
        """[rows, ...] -> [selected rows, ...]."""
        return rows if self.selected is None else rows.index_select(0, self.selected)


class PackedAttention(MegatronModule):
    """Core attention of a megatron-core SelfAttention, over the segments of an `AttentionLayout`."""

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
        """As megatron-core's DotProductAttention; `windowed_layers` are the 1-based numbers of those with windows."""
        super().__init__(config=config)
        self.selects_tokens = selects_tokens
        self.layer_number = layer_number
        self.windowed = layer_number in windowed_layers
        self.softmax_scale = softmax_scale

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
        """query [rows, 1, heads, head_dim]; key, value [rows, 1, kv_heads, head_dim]; [rows, 1, heads * head_dim],
        of the selected rows if it selects them.

        Query and key come without their positions.
        """
        if packed_seq_params is None or packed_seq_params.rope is None:
            raise ValueError("PackedAttention needs an AttentionLayout with a rope as packed_seq_params")
        rope = packed_seq_params.rope
        query, key = mrope(query.squeeze(1), key.squeeze(1), rope.cos, rope.sin, inplace=False)
        # A view would keep the joint projection of query, key and value until the backward pass.
        rows = (query, key, value.squeeze(1).contiguous())
        if packed_seq_params.cached is not None:
            output = packed_seq_params.cached.attend(self.layer_number, *rows, self.softmax_scale)
        else:
            layout = packed_seq_params.windows if self.windowed else packed_seq_params.full
            assert layout is not None, "the layout lacks what this layer reads"
            output = shared_prefix_attention(*rows, layout, scale=self.softmax_scale)
        if self.selects_tokens:
            output = packed_seq_params.select(output)
        return output.flatten(1).unsqueeze(1)
