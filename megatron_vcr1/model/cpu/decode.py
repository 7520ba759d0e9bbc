"""The decoder layers for one new token per response, computed directly on their weights.

With so few tokens, the Python overhead of megatron-core's modules costs as much as the matmuls.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

from megatron_vcr1.model.attention import RotaryTables
from megatron_vcr1.model.cpu.skinny_linear import skinny_linear
from megatron_vcr1.model.kv_cache import KVCache
from megatron_vcr1.model.layer_specs import LayerNormColumnParallelLinear, PackedMLP, RMSNorm


def supports(decoder: TransformerBlock) -> bool:
    """Return whether `run_layers` can run this decoder: the local backend's layers, without tensor parallelism."""
    return decoder.config.tensor_model_parallel_size == 1 and all(
        isinstance(layer.self_attention.linear_qkv, LayerNormColumnParallelLinear) for layer in decoder.layers
    )


def run_layers(decoder: TransformerBlock, hidden: Tensor, rope: RotaryTables, cache: KVCache) -> Tensor:
    """Run all layers of this stage, and the final norm if it is here, on one new token per response.

    Computes what `decoder` computes, without gradients. Requires `supports(decoder)`. The results are rounded where
    the modules round them, so that half-precision log-probs of the engine stay as close to training's.

    Args:
        decoder: this rank's decoder layers.
        hidden: [responses, hidden_size].
        rope: tables for the new tokens' positions.
        cache: keys and values of the prompts and of the responses so far; the new token's are added.

    Returns:
        [responses, hidden_size].
    """
    # Skips the torch function mode of `cuda_emulation`, which costs time in every call; nothing here names a device.
    with torch._C.DisableTorchFunction():
        return _run_layers(decoder, hidden, rope, cache)


def _run_layers(decoder: TransformerBlock, hidden: Tensor, rope: RotaryTables, cache: KVCache) -> Tensor:
    cos, sin = rope.cos[:, None, None], rope.sin[:, None, None]
    # The sign of "rotate half" moves into the sine: x * cos + roll(x, half) * signed_sin.
    first_half, second_half = sin.chunk(2, -1)
    signed_sin = torch.cat((-first_half, second_half), -1)
    for layer in decoder.layers:
        hidden = hidden + _attention(layer.self_attention, hidden, cos, signed_sin, cache)
        if isinstance(layer.mlp, PackedMLP):
            hidden = hidden + _mlp(layer.mlp, hidden)
        else:  # experts: their matmuls take longer than the Python of their few modules
            output, _ = layer.mlp(layer.pre_mlp_layernorm(hidden[:, None]))
            hidden = hidden + output[:, 0]
    return hidden if decoder.final_layernorm is None else decoder.final_layernorm(hidden)


def _attention(attention: Any, x: Tensor, cos: Tensor, signed_sin: Tensor, cache: KVCache) -> Tensor:
    """Apply self-attention with its norm and both projections.

    Args:
        attention: megatron-core's SelfAttention.
        x: [responses, hidden_size].
        cos: [responses, 1, 1, head_dim].
        signed_sin: [responses, 1, 1, head_dim]; the first half of the features is negated.
        cache: as for `run_layers`.

    Returns:
        [responses, hidden_size], without the residual.
    """
    linear, head_dim = attention.linear_qkv, signed_sin.shape[-1]
    heads = skinny_linear(_normalize(linear, x), linear.weight)
    if linear.bias is not None:
        heads.add_(linear.bias)
    # [responses, kv_heads, queries per kv_head + 2, head_dim]: for each key-value head its queries, its key, its value.
    heads = heads.view(len(x), attention.num_query_groups_per_partition, -1, head_dim)
    query_key = heads[:, :, :-1]
    if isinstance(attention.q_layernorm, RMSNorm):
        parts = zip((attention.q_layernorm, attention.k_layernorm), query_key.tensor_split((-1,), 2), strict=True)
        query_key = torch.cat([F.rms_norm(part, norm.weight.shape, norm.weight, norm.eps) for norm, part in parts], 2)
    query_key = query_key.to(signed_sin.dtype)  # in float32, as vcr1_kernels.mrope
    query_key = (query_key * cos + query_key.roll(head_dim // 2, -1) * signed_sin).to(x.dtype)
    core = attention.core_attention
    query, key, value = query_key[:, :, :-1].flatten(1, 2), query_key[:, :, -1], heads[:, :, -1]
    output = cache.attend(core.layer_number, query, key, value, core.softmax_scale)
    return skinny_linear(output.flatten(1), attention.linear_proj.weight)


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    """Apply the SwiGLU MLP with its norm; [responses, hidden_size] to the same shape, without the residual."""
    gate, up = skinny_linear(_normalize(mlp.linear_fc1, x), mlp.linear_fc1.weight).chunk(2, -1)
    activated = F.silu(gate.float()) * up  # in float32, as vcr1_kernels.swiglu
    return skinny_linear(activated.to(x.dtype), mlp.linear_fc2.weight)


def _normalize(linear: LayerNormColumnParallelLinear, x: Tensor) -> Tensor:
    weight = linear.layer_norm_weight
    return F.rms_norm(x, weight.shape, weight, linear.config.layernorm_epsilon)
