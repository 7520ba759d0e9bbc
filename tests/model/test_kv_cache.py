"""The KV cache against attention over whole sequences, computed token by token."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vcr1_kernels import SegmentLayout

from megatron_vcr1.model.kv_cache import KVCache, PrefillAttention

HEADS, KV_HEADS, HEAD_DIM, SCALE = 6, 2, 8, 0.3
LAYERS = (3, 4)  # a pipeline stage that starts with the third layer


def _random_inputs(num_tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((num_tokens, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return query, key, value


def _attention(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend with one query [heads, head_dim] to keys and values [tokens, kv_heads, head_dim]."""
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (keys, values))
    weights = (SCALE * torch.einsum("hd,thd->ht", query, keys)).softmax(-1)
    return torch.einsum("ht,thd->hd", weights, values)


@pytest.mark.parametrize(
    "prompt_lengths, response_groups, keeps",
    [
        ((5,), (0, 0, 0), {}),
        ((16, 16), (0, 0, 1, 1), {1: [0, 2, 3]}),
        ((5, 33, 7), (0, 0, 1, 2, 2, 2), {0: [0, 2, 3, 5], 2: [0, 2]}),
        ((1, 2), (0, 1), {66: [1]}),
    ],
)
def test_each_response_attends_to_its_prompt_and_its_own_tokens(
    prompt_lengths: tuple[int, ...], response_groups: tuple[int, ...], keeps: dict[int, list[int]]
) -> None:
    """Prompts are computed in one and in several passes, responses leave between steps, and the capacity grows."""
    num_steps = 3 if not keeps else max(keeps) + 3
    generator = torch.Generator().manual_seed(0)
    cache = KVCache(prompt_lengths, response_groups, num_steps, torch.device("cpu"))
    passes = [range(len(prompt_lengths))] if len(prompt_lengths) < 3 else [range(0, 2), range(2, 3)]
    prompts = {}
    for layer in LAYERS:
        for groups in passes:
            lengths = [prompt_lengths[group] for group in groups]
            query, key, value = _random_inputs(sum(lengths), generator)
            attention = PrefillAttention(SegmentLayout.packed(lengths), cache, groups)
            output = attention.attend(layer, query, key, value, SCALE)
            torch.testing.assert_close(output[0], _attention(query[0], key[:1], value[:1]))
            for group, keys, values in zip(groups, key.split(lengths), value.split(lengths), strict=True):
                prompts[layer, group] = (keys, values)
    histories = {
        (layer, response): prompts[layer, group] for layer in LAYERS for response, group in enumerate(response_groups)
    }
    live = list(range(len(response_groups)))
    for step in range(num_steps):
        for layer in LAYERS:
            query, key, value = _random_inputs(len(live), generator)
            output = cache.attend(layer, query, key, value, SCALE)
            for place, response in enumerate(live):
                keys, values = histories[layer, response]
                histories[layer, response] = (
                    torch.cat((keys, key[place : place + 1])),
                    torch.cat((values, value[place : place + 1])),
                )
                torch.testing.assert_close(
                    output[place], _attention(query[place], *histories[layer, response]), atol=1e-5, rtol=1e-5
                )
        cache.advance()
        if step in keeps:
            cache.keep_responses(keeps[step])
            live = [live[place] for place in keeps[step]]
