"""A decoding step: the layers' arithmetic on their weights, without megatron-core's modules between.

With one token a row, the modules' Python takes as long as the products do.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_vcr1.model.attention import RotaryTables
from megatron_vcr1.model.kv_cache import KVCache
from megatron_vcr1.model.layer_specs import LayerNormColumnParallelLinear


def supports(decoder: TransformerBlock) -> bool:
    """Whether the layers are the local backend's, and no tensor-parallel ranks divide them."""
    undivided = decoder.config.tensor_model_parallel_size == 1
    return undivided and all(
        isinstance(layer.self_attention.linear_qkv, LayerNormColumnParallelLinear) for layer in decoder.layers
    )


def run_layers(decoder: TransformerBlock, hidden: Tensor, rope: RotaryTables, cache: KVCache) -> Tensor:
    """What the decoder gives for one new token a row, without a gradient; for layers that `supports`.

    Args:
        hidden: [rows, hidden_size].

    Returns:
        [rows, hidden_size].
    """
    with torch._C.DisableTorchFunction():  # nothing here names a device, which parallel.cpu_backend would look for
        return _run_layers(decoder, hidden, rope, cache)


def _run_layers(decoder: TransformerBlock, hidden: Tensor, rope: RotaryTables, cache: KVCache) -> Tensor:
    cosine, sine = rope.cos[:, None, None], rope.sin[:, None, None]
    first_half, second_half = sine.chunk(2, -1)
    sine = torch.cat((-first_half, second_half), -1)
    for layer in decoder.layers:
        hidden = hidden + _attention(layer.self_attention, hidden, cosine, sine, cache)
        hidden = hidden + _mlp(layer.mlp, hidden)
    return hidden if decoder.final_layernorm is None else decoder.final_layernorm(hidden)


def _attention(attention: Any, x: Tensor, cosine: Tensor, sine: Tensor, cache: KVCache) -> Tensor:
    """Of rows [rows, hidden_size]; cosine and sine [rows, 1, 1, head_dim], the first half of the sine negative."""
    linear = attention.linear_qkv
    heads = skinny_linear(_normed(linear, x), linear.weight).add_(linear.bias)
    # Of each key head: its queries, the key and the value.
    heads = heads.view(len(x), attention.num_query_groups_per_partition, -1, sine.shape[-1])
    turned = heads[:, :, :-1].to(sine.dtype)  # in float32, as vcr1_kernels.mrope
    turned = (turned * cosine + turned.roll(sine.shape[-1] // 2, -1) * sine).to(x.dtype)
    core = attention.core_attention
    query, key, value = turned[:, :, :-1].flatten(1, 2), turned[:, :, -1], heads[:, :, -1]
    output = cache.attend(core.layer_number, query, key, value, core.softmax_scale)
    return skinny_linear(output.flatten(1), attention.linear_proj.weight)


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    gate, up = skinny_linear(_normed(mlp.linear_fc1, x), mlp.linear_fc1.weight).chunk(2, -1)
    inner = F.silu(gate.float()) * up  # in float32, as vcr1_kernels.swiglu
    return skinny_linear(inner.to(x.dtype), mlp.linear_fc2.weight)


def _normed(linear: LayerNormColumnParallelLinear, x: Tensor) -> Tensor:
    weight = linear.layer_norm_weight
    return F.rms_norm(x, weight.shape, weight, linear.config.layernorm_epsilon)


def skinny_linear(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight.T.

    On a CPU, MKL reads a float32 weight for 3 to 12 rows at a third of memory's speed, in blocks of 16 rows at nearly
    full speed: 7 ms instead of 16 for 8 rows of 512 and a vocabulary of 32768.
    """
    if rows.device.type != "cpu" or rows.dtype != torch.float32 or not 3 <= len(rows) <= 12 or len(weight) % 16:
        return F.linear(rows, weight)
    return (rows @ weight.view(-1, 16, weight.shape[1]).mT).transpose(0, 1).flatten(1)
