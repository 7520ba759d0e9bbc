"""PackedAttention against attention computed segment by segment, with the choice of layout and of tokens.

The rotary positions of PackedSelfAttention are compared with transformers in test_video_language_model.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from vcr1_kernels import SegmentLayout

from megatron_vcr1.model.attention import AttentionLayout, PackedAttention
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


def _inputs() -> list[Tensor]:
    """Return query, key and value."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(TOKENS, 1, number, HEAD_DIM, generator=generator) for number in (HEADS, KV_HEADS, KV_HEADS)]


def _expected(lengths: tuple[int, ...]) -> Tensor:
    parts = zip(*(x[:, 0].split(lengths) for x in _inputs()), strict=True)
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
    output = attention(*_inputs(), packed_seq_params=AttentionLayout(full=FULL, windows=WINDOWS))
    torch.testing.assert_close(output, _expected(lengths), atol=1e-5, rtol=1e-5)


def test_only_a_layer_that_selects_tokens_drops_the_others() -> None:
    layout = AttentionLayout(full=FULL, selected=torch.tensor([5, 1]))
    for selects_tokens, indices in ((True, [5, 1]), (False, list(range(TOKENS)))):
        attention = PackedAttention(CONFIG, 1, selects_tokens=selects_tokens)
        output = attention(*_inputs(), packed_seq_params=layout)
        torch.testing.assert_close(output, _expected((4, 2))[indices], atol=1e-5, rtol=1e-5)


def test_cached_attention_replaces_the_layout() -> None:
    class Cache:
        def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
            assert (layer_number, scale) == (1, 0.5)
            assert query.shape[1:] == (HEADS, HEAD_DIM) and key.shape == value.shape == (TOKENS, KV_HEADS, HEAD_DIM)
            return query + 1

    attention = PackedAttention(CONFIG, 1, softmax_scale=0.5)
    output = attention(*_inputs(), packed_seq_params=AttentionLayout(full=FULL, cached=Cache()))
    assert torch.equal(output, (_inputs()[0] + 1).flatten(2))
