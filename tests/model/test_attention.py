"""PackedAttention against attention computed segment by segment, with the choice of layout and of tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from vcr1_kernels import SegmentLayout, mrope

from megatron_vcr1.model.attention import AttentionLayout, PackedAttention, RotaryTables
from megatron_vcr1.parallel.megatron_compat import no_cuda_graphs

HEADS, KV_HEADS, HEAD_DIM, TOKENS = 4, 2, 8, 6
CONFIG = TransformerConfig(
    num_layers=2,
    hidden_size=HEADS * HEAD_DIM,
    num_attention_heads=HEADS,
    use_cpu_initialization=True,
    **no_cuda_graphs(),
)
FULL = SegmentLayout.packed((4, 2), causal=False)
WINDOWS = SegmentLayout.packed((2, 2, 2), causal=False)


def _inputs() -> tuple[Tensor, Tensor, Tensor, RotaryTables]:
    generator = torch.Generator().manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    query, key, value = (torch.randn(TOKENS, 1, number, HEAD_DIM, generator=generator) for number in heads)
    angles = torch.rand(TOKENS, HEAD_DIM // 2, generator=generator).repeat(1, 2)
    return query, key, value, RotaryTables.from_angles(angles)


def _expected(lengths: tuple[int, ...]) -> Tensor:
    query, key, value, rope = _inputs()
    query, key = mrope(query[:, 0], key[:, 0], rope.cos, rope.sin, inplace=False)
    parts = zip(*(x.split(lengths) for x in (query, key, value[:, 0])), strict=True)
    outputs = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part), enable_gqa=True).transpose(0, 1)
        for part in parts
    ]
    return torch.cat(outputs).flatten(1).unsqueeze(1)


@pytest.mark.parametrize("layer_number, lengths", [(1, (4, 2)), (2, (2, 2, 2))])
def test_a_windowed_layer_attends_within_windows_and_others_within_segments(
    layer_number: int, lengths: tuple[int, ...]
) -> None:
    attention = PackedAttention(CONFIG, layer_number, windowed_layers=frozenset({2}))
    query, key, value, rope = _inputs()
    output = attention(query, key, value, packed_seq_params=AttentionLayout(rope=rope, full=FULL, windows=WINDOWS))
    torch.testing.assert_close(output, _expected(lengths), atol=1e-5, rtol=1e-5)


def test_only_a_layer_that_selects_tokens_drops_the_others() -> None:
    query, key, value, rope = _inputs()
    layout = AttentionLayout(rope=rope, full=FULL, selected=torch.tensor([5, 1]))
    for selects_tokens, indices in ((True, [5, 1]), (False, list(range(TOKENS)))):
        attention = PackedAttention(CONFIG, 1, selects_tokens=selects_tokens)
        output = attention(query, key, value, packed_seq_params=layout)
        torch.testing.assert_close(output, _expected((4, 2))[indices], atol=1e-5, rtol=1e-5)


def test_cached_attention_replaces_the_layout() -> None:
    class Cache:
        def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
            assert (layer_number, scale) == (1, 0.5)
            assert query.shape[1:] == (HEADS, HEAD_DIM) and key.shape == value.shape == (TOKENS, KV_HEADS, HEAD_DIM)
            return query + 1

    query, key, value, rope = _inputs()
    attention = PackedAttention(CONFIG, 1, softmax_scale=0.5)
    output = attention(query, key, value, packed_seq_params=AttentionLayout(rope=rope, full=FULL, cached=Cache()))
    rotated, _ = mrope(query[:, 0], key[:, 0], rope.cos, rope.sin, inplace=False)
    assert torch.equal(output, (rotated + 1).flatten(1).unsqueeze(1))


def test_a_layout_without_rope_tables_is_an_error() -> None:
    query, key, value, _ = _inputs()
    with pytest.raises(ValueError, match="RoPE tables"):
        PackedAttention(CONFIG, 1)(query, key, value, packed_seq_params=AttentionLayout(full=FULL))
