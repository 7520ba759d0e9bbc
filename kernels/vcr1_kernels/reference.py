"""The reference that tests compare the ops with: every op in plain PyTorch, written the way its equation is.

Arguments and shapes are those of the public ops, gradients come from autograd, and the vocabulary is not sharded.
Nothing here saves memory or time, and arguments are not checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vcr1_kernels.layout import SegmentLayout
from vcr1_kernels.records import TokenLoss


def log_probs_from_logits(
    logits: Tensor,
    target_ids: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the log-prob of each target, [tokens], from logits [tokens, vocab]."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    # A token whose logits are all -inf has no distribution: its log-prob is -inf, its entropy and gradient are 0.
    masked = (scaled == -torch.inf).all(-1, keepdim=True)
    log_softmax = scaled.masked_fill(masked, 0).log_softmax(-1).masked_fill(masked, -torch.inf)
    log_probs = log_softmax.gather(-1, target_ids[:, None])[:, 0]
    if not return_entropy:
        return log_probs
    finite = log_softmax.masked_fill(log_softmax == -torch.inf, 0)
    return log_probs, -(log_softmax.exp() * finite).sum(-1)


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the log-prob of each target, [tokens], under the head `hidden @ weight.T`."""
    return log_probs_from_logits(
        hidden @ weight.t(), target_ids, temperature=temperature, return_entropy=return_entropy
    )


def grpo_token_loss(
    log_probs: Tensor,
    advantages: Tensor,
    *,
    old_log_probs: Tensor | None = None,
    ref_log_probs: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    kl_coef: float = 0.04,
    kl_estimator: str = "k3",
    rollout_ratio_cap: float | None = None,
    importance_level: str = "token",
    segment_ids: Tensor | None = None,
) -> TokenLoss:
    """Compute the clipped surrogate plus KL of each token, [tokens]; see `vcr1_kernels.grpo_token_loss`."""
    current = log_probs.detach()
    old = current if old_log_probs is None else old_log_probs
    if importance_level == "sequence" and segment_ids is not None:
        log_ratio = torch.zeros_like(log_probs)
        for segment in segment_ids.unique():
            tokens = segment_ids == segment
            mean = (current - old)[tokens].mean()
            # log_probs - current is 0: the value is the segment's mean, the gradient is that of the token's log-prob.
            log_ratio[tokens] = mean + log_probs[tokens] - current[tokens]
    else:
        log_ratio = log_probs - old
    ratio = log_ratio.exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    clipped = ((ratio < 1 - clip_low) & (advantages < 0)) | ((ratio > 1 + clip_high) & (advantages > 0))
    if dual_clip is not None:
        clipped = clipped | ((advantages < 0) & (ratio > dual_clip))
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    if rollout_log_probs is not None:
        correction = (old - rollout_log_probs).exp()
        surrogate = surrogate * (correction if rollout_ratio_cap is None else correction.clamp(max=rollout_ratio_cap))
    kl = torch.zeros_like(log_probs)
    if ref_log_probs is not None:
        delta = log_probs - ref_log_probs
        kl = {"k1": delta, "k2": 0.5 * delta**2, "k3": (-delta).exp() + delta - 1}[kl_estimator]
    return TokenLoss(kl_coef * kl - surrogate, kl.detach(), ratio.detach(), clipped)


def shared_prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, *, scale: float | None = None
) -> Tensor:
    """Compute softmax attention with the layout's dense mask; [queries, num_heads, head_dim]."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    heads_per_kv_head = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(heads_per_kv_head, 1), value.repeat_interleave(heads_per_kv_head, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key).to(torch.promote_types(query.dtype, torch.float32)) * scale
    scores = scores.masked_fill(~attention_mask(layout).to(query.device), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(value.dtype), value)


def attention_mask(layout: SegmentLayout) -> Tensor:
    """Return the layout's mask, bool [queries, tokens]: whether query i attends to key j."""
    lengths = torch.tensor(layout.lengths, dtype=torch.int64)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    prefix = torch.tensor(layout.prefixes, dtype=torch.int64)[segment]
    own_segment = segment[:, None] == segment
    if layout.causal:
        tokens = torch.arange(len(segment))
        own_segment &= tokens[:, None] >= tokens
    mask = own_segment | (prefix[:, None] == segment)
    if layout.queries is None:
        return mask
    return torch.cat([mask[:0], *(mask[start:end] for start, end in layout.queries)])


def frames_to_patches(
    frames: Tensor,
    *,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    unit_order: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Cut uint8 frames into patch vectors, one by one; [num_patches, 3 * temporal_patch_size * patch_size**2]."""
    pixels = (frames.double() / 255 - torch.tensor(mean, dtype=torch.double)) / torch.tensor(std, dtype=torch.double)
    num_frames, height, width, _ = frames.shape
    unit_size = patch_size * merge_size
    patches = []
    for start in range(0, num_frames, temporal_patch_size):
        patch_frames = [pixels[min(start + i, num_frames - 1)] for i in range(temporal_patch_size)]
        for unit_y in range(0, height, unit_size):
            for unit_x in range(0, width, unit_size):
                for y in range(unit_y, unit_y + unit_size, patch_size):
                    for x in range(unit_x, unit_x + unit_size, patch_size):
                        patch = torch.stack([frame[y : y + patch_size, x : x + patch_size] for frame in patch_frames])
                        patches.append(patch.permute(3, 0, 1, 2).flatten())
    units = torch.stack(patches).unflatten(0, (-1, merge_size**2))
    if unit_order is not None:
        units = units[unit_order]
    return units.flatten(0, 1).to(dtype)


def swiglu(gate_up: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute silu(gate) * up, [..., ffn_size], from [..., gate | up] plus a bias."""
    biased = gate_up if bias is None else gate_up + bias
    gate, up = biased.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Compute x / sqrt(mean(x^2) + epsilon) * weight over the last dimension."""
    x_float = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x_float * (x_float.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight).to(x.dtype)


def mrope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return rotated copies of query and key, [tokens, heads, head_dim] (rotate-half convention)."""

    def rotate(x: Tensor) -> Tensor:
        first, second = x.to(cos.dtype).chunk(2, dim=-1)
        rotated_half = torch.cat([-second, first], dim=-1)
        return (x * cos[:, None] + rotated_half * sin[:, None]).to(x.dtype)

    return rotate(query), rotate(key)


def qkv_mrope(projection: Tensor, cos: Tensor, sin: Tensor, *, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return the rotated query, the rotated key and the value of [tokens, kv_heads, query heads + 2, head_dim]."""
    heads = projection if bias is None else projection + bias
    return *mrope(heads[:, :, :-2].flatten(1, 2), heads[:, :, -2], cos, sin), heads[:, :, -1]
