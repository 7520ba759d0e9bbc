"""Every op in plain PyTorch, as one would write it on paper: the truth that the kernels are held against.

Gradients are autograd's, arguments and shapes those of the public ops, the vocabulary is whole. Nothing here saves
memory or time, and nothing is checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vcr1_kernels.layout import SegmentLayout
from vcr1_kernels.ops.token_loss import TokenLoss


def log_probs_from_logits(
    logits: Tensor,
    target_ids: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each target, [tokens], of logits [tokens, vocab]."""
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    # A row whose logits are all -inf has no distribution: its log-probs are -inf and its entropy and gradient 0.
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
    """Log-probability of each target, [tokens], under the head `hidden @ weight.T`."""
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
    """The clipped surrogate plus KL of each token, [tokens]; see `vcr1_kernels.grpo_token_loss`."""
    current = log_probs.detach()
    old = current if old_log_probs is None else old_log_probs
    if importance_level == "sequence" and segment_ids is not None:
        log_ratio = torch.zeros_like(log_probs)
        for segment in segment_ids.unique():
            rows = segment_ids == segment
            mean = (current - old)[rows].mean()
            log_ratio[rows] = (
                mean + log_probs[rows] - current[rows]
            )  # the value is the mean, the gradient is the token's
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
    """Softmax attention under the layout's dense mask; [tokens, num_heads, head_dim]."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group_size = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group_size, 1), value.repeat_interleave(group_size, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key).to(torch.promote_types(query.dtype, torch.float32)) * scale
    scores = scores.masked_fill(~visibility(layout).to(query.device), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(value.dtype), value)


def visibility(layout: SegmentLayout) -> Tensor:
    """bool [tokens, tokens]: whether the row's query sees the column's key."""
    lengths = torch.tensor(layout.lengths, dtype=torch.int64)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    prefix = torch.tensor(layout.prefixes, dtype=torch.int64)[segment]
    own = segment[:, None] == segment
    if layout.causal:
        rows = torch.arange(len(segment))
        own &= rows[:, None] >= rows
    return own | (prefix[:, None] == segment)


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
    """Patch vectors of uint8 frames, built patch by patch; [num_patches, 3 * temporal_patch_size * patch_size**2]."""
    pixels = (frames.double() / 255 - torch.tensor(mean, dtype=torch.double)) / torch.tensor(std, dtype=torch.double)
    num_frames, height, width, _ = frames.shape
    unit_size = patch_size * merge_size
    patches = []
    for start in range(0, num_frames, temporal_patch_size):
        pair = [pixels[min(start + i, num_frames - 1)] for i in range(temporal_patch_size)]
        for unit_y in range(0, height, unit_size):
            for unit_x in range(0, width, unit_size):
                for y in range(unit_y, unit_y + unit_size, patch_size):
                    for x in range(unit_x, unit_x + unit_size, patch_size):
                        patch = torch.stack([frame[y : y + patch_size, x : x + patch_size] for frame in pair])
                        patches.append(patch.permute(3, 0, 1, 2).flatten())
    units = torch.stack(patches).unflatten(0, (-1, merge_size**2))
    if unit_order is not None:
        units = units[unit_order]
    return units.flatten(0, 1).to(dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., gate | up]; [..., ffn_size]."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight).to(x.dtype)


def mrope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated copies of query and key, [tokens, heads, head_dim]; the rotate-half convention."""

    def rotate(x: Tensor) -> Tensor:
        first, second = x.to(cos.dtype).chunk(2, dim=-1)
        half_turned = torch.cat([-second, first], dim=-1)
        return (x * cos[:, None] + half_turned * sin[:, None]).to(x.dtype)

    return rotate(query), rotate(key)
