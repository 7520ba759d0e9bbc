"""Triton path of `vcr1_kernels.ops.token_loss`: the whole objective of a token and its derivative in one launch."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcr1_kernels.ops.token_loss import Objective, TokenLoss

_BLOCK = 256


# Slices of packed batches begin anywhere: without this, each new alignment would compile the kernel again.
@triton.jit(
    do_not_specialize=["num_tokens"],
    do_not_specialize_on_alignment=[
        "log_probs_ptr",
        "advantages_ptr",
        "old_ptr",
        "ref_ptr",
        "rollout_ptr",
        "log_ratio_ptr",
        "loss_ptr",
        "kl_ptr",
        "ratio_ptr",
        "clipped_ptr",
        "slope_ptr",
    ],
)
def _token_loss_kernel(
    log_probs_ptr,
    advantages_ptr,
    old_ptr,
    ref_ptr,
    rollout_ptr,
    log_ratio_ptr,
    loss_ptr,
    kl_ptr,
    ratio_ptr,
    clipped_ptr,
    slope_ptr,
    num_tokens,
    ratio_low,
    ratio_high,
    dual_clip,
    kl_coef,
    rollout_ratio_cap,
    HAS_DUAL_CLIP: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_tokens
    advantage = tl.load(advantages_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    ratio = tl.exp(tl.load(log_ratio_ptr + rows, mask=inside, other=0.0).to(tl.float32))

    surrogate = ratio * advantage
    bound = tl.minimum(tl.maximum(ratio, ratio_low), ratio_high) * advantage
    clipped = ((advantage < 0) & (ratio < ratio_low)) | ((advantage > 0) & (ratio > ratio_high))
    slope = tl.where(clipped, 0.0, -surrogate)
    loss = -tl.minimum(surrogate, bound)
    if HAS_DUAL_CLIP:
        beyond = (advantage < 0) & (ratio > dual_clip)
        clipped = clipped | beyond
        slope = tl.where(beyond, 0.0, slope)
        loss = tl.where(beyond, -dual_clip * advantage, loss)
    if HAS_ROLLOUT:
        old = tl.load(old_ptr + rows, mask=inside, other=0.0).to(tl.float32)
        rollout = tl.load(rollout_ptr + rows, mask=inside, other=0.0).to(tl.float32)
        correction = tl.minimum(tl.exp(old - rollout), rollout_ratio_cap)
        loss *= correction
        slope *= correction

    kl = tl.zeros([BLOCK], tl.float32)
    if HAS_REF:
        log_prob = tl.load(log_probs_ptr + rows, mask=inside, other=0.0).to(tl.float32)
        delta = log_prob - tl.load(ref_ptr + rows, mask=inside, other=0.0).to(tl.float32)
        if KL_ESTIMATOR == "k1":
            kl = delta
            kl_slope = tl.full([BLOCK], 1.0, tl.float32)
        elif KL_ESTIMATOR == "k2":
            kl = 0.5 * delta * delta
            kl_slope = delta
        else:
            # exp(-d) - 1 loses all digits of a small d: there the first terms of its series are exact.
            shortfall = tl.where(
                tl.abs(delta) < 0.01, -delta * (1 - delta * (0.5 - delta * (1 / 6 - delta / 24))), tl.exp(-delta) - 1
            )
            kl = shortfall + delta
            kl_slope = -shortfall
        loss += kl_coef * kl
        slope += kl_coef * kl_slope

    tl.store(loss_ptr + rows, loss, mask=inside)
    tl.store(kl_ptr + rows, kl, mask=inside)
    tl.store(ratio_ptr + rows, ratio, mask=inside)
    tl.store(clipped_ptr + rows, clipped, mask=inside)
    tl.store(slope_ptr + rows, slope, mask=inside)


def launch_token_loss(
    log_probs: Tensor,
    advantages: Tensor,
    old_log_probs: Tensor,
    ref_log_probs: Tensor | None,
    rollout_log_probs: Tensor | None,
    log_ratio: Tensor,
    objective: Objective,
) -> tuple[TokenLoss, Tensor]:
    """The token losses and their derivatives by the log-probs; float32 [tokens]."""
    loss, kl, ratio, slope = torch.empty(4, len(log_probs), dtype=torch.float32, device=log_probs.device)
    clipped = torch.empty(len(log_probs), dtype=torch.bool, device=log_probs.device)
    unread = log_probs  # stands in for tensors that the kernel was told not to read
    inputs = (
        log_probs,
        advantages,
        old_log_probs,
        unread if ref_log_probs is None else ref_log_probs,
        unread if rollout_log_probs is None else rollout_log_probs,
        log_ratio,
    )
    if len(log_probs):
        _token_loss_kernel[(triton.cdiv(len(log_probs), _BLOCK),)](
            *(tensor.contiguous() for tensor in inputs),
            loss,
            kl,
            ratio,
            clipped,
            slope,
            len(log_probs),
            1 - objective.clip_low,
            1 + objective.clip_high,
            objective.dual_clip or 0.0,
            objective.kl_coef,
            objective.rollout_ratio_cap or math.inf,
            HAS_DUAL_CLIP=objective.dual_clip is not None,
            HAS_REF=ref_log_probs is not None,
            HAS_ROLLOUT=rollout_log_probs is not None,
            KL_ESTIMATOR=objective.kl_estimator,
            BLOCK=_BLOCK,
        )
    return TokenLoss(loss, kl, ratio, clipped), slope
