"""Triton path of `vcr1_kernels.ops.token_loss`: the objective of each token and its derivative in one launch."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcr1_kernels.backend import on_its_gpu
from vcr1_kernels.records import Objective, TokenInputs, TokenLoss
from vcr1_kernels.triton_ops import FUSED

_BLOCK = 256


# Slices of packed batches start anywhere. Without these options, each alignment would compile the kernel again.
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
        "grad_ptr",
    ],
)
def _token_loss_kernel(
    log_probs_ptr,
    advantages_ptr,
    old_ptr,
    ref_ptr,
    rollout_ptr,
    log_ratio_ptr,  # log-ratio of the token, or the mean over its sequence
    loss_ptr,  # this and the next four are outputs: float32 [tokens], except for clipped, which is bool
    kl_ptr,
    ratio_ptr,
    clipped_ptr,
    grad_ptr,  # d loss / d log_prob
    num_tokens,
    ratio_low,  # 1 - clip_low
    ratio_high,  # 1 + clip_high
    dual_clip,
    kl_coef,
    rollout_ratio_cap,
    HAS_DUAL_CLIP: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute kl_coef * kl - c * min(r A, clip(r) A) and its derivative for BLOCK tokens; see `Objective`.

    Grid: (token blocks). The computation is elementwise and float32; masked tokens compute with zeros and are not
    stored. The derivative of r with respect to the log-prob is r, whether r is a token's ratio or a sequence's.
    """
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < num_tokens
    advantage = tl.load(advantages_ptr + tokens, mask=inside, other=0.0).to(tl.float32)
    ratio = tl.exp(tl.load(log_ratio_ptr + tokens, mask=inside, other=0.0).to(tl.float32))

    surrogate = ratio * advantage
    clipped_surrogate = tl.minimum(tl.maximum(ratio, ratio_low), ratio_high) * advantage
    # The minimum takes the clipped surrogate, which is constant, only on one side for each sign of the advantage.
    clipped = ((advantage < 0) & (ratio < ratio_low)) | ((advantage > 0) & (ratio > ratio_high))
    grad = tl.where(clipped, 0.0, -surrogate)
    loss = -tl.minimum(surrogate, clipped_surrogate)
    if HAS_DUAL_CLIP:
        dual_clipped = (advantage < 0) & (ratio > dual_clip)
        clipped = clipped | dual_clipped
        grad = tl.where(dual_clipped, 0.0, grad)
        loss = tl.where(dual_clipped, -dual_clip * advantage, loss)
    if HAS_ROLLOUT:
        old = tl.load(old_ptr + tokens, mask=inside, other=0.0).to(tl.float32)
        rollout = tl.load(rollout_ptr + tokens, mask=inside, other=0.0).to(tl.float32)
        correction = tl.minimum(tl.exp(old - rollout), rollout_ratio_cap)
        loss *= correction
        grad *= correction

    kl = tl.zeros([BLOCK], tl.float32)
    if HAS_REF:
        log_prob = tl.load(log_probs_ptr + tokens, mask=inside, other=0.0).to(tl.float32)
        delta = log_prob - tl.load(ref_ptr + tokens, mask=inside, other=0.0).to(tl.float32)
        if KL_ESTIMATOR == "k1":
            kl = delta
            kl_grad = tl.full([BLOCK], 1.0, tl.float32)
        elif KL_ESTIMATOR == "k2":
            kl = 0.5 * delta * delta
            kl_grad = delta
        else:
            # reference / policy - 1 = exp(-d) - 1. For small d the subtraction loses all digits, and Triton has no
            # expm1: for |d| < 0.01 the first four terms of the series are exact to float32.
            reference_excess = tl.where(
                tl.abs(delta) < 0.01, -delta * (1 - delta * (0.5 - delta * (1 / 6 - delta / 24))), tl.exp(-delta) - 1
            )
            kl = reference_excess + delta
            kl_grad = -reference_excess
        loss += kl_coef * kl
        grad += kl_coef * kl_grad

    tl.store(loss_ptr + tokens, loss, mask=inside)
    tl.store(kl_ptr + tokens, kl, mask=inside)
    tl.store(ratio_ptr + tokens, ratio, mask=inside)
    tl.store(clipped_ptr + tokens, clipped, mask=inside)
    tl.store(grad_ptr + tokens, grad, mask=inside)


@on_its_gpu
def launch_token_loss(
    log_probs: Tensor, inputs: TokenInputs, log_ratio: Tensor, objective: Objective
) -> tuple[TokenLoss, Tensor]:
    """Return the loss of each token and its derivative with respect to the log-prob; float32 [tokens].

    `inputs.old_log_probs` must not be None here: on-policy, pass `log_probs` itself.
    """
    num_tokens = len(log_probs)
    loss, kl, ratio, grad = torch.empty(4, num_tokens, dtype=torch.float32, device=log_probs.device)
    clipped = torch.empty(num_tokens, dtype=torch.bool, device=log_probs.device)
    # A missing tensor is replaced by log_probs as a placeholder, which the kernel does not read.
    tensors = (log_probs if tensor is None else tensor for tensor in (log_probs, *inputs, log_ratio))
    if num_tokens:
        _token_loss_kernel[(triton.cdiv(num_tokens, _BLOCK),)](
            *(tensor.contiguous() for tensor in tensors),
            loss,
            kl,
            ratio,
            clipped,
            grad,
            num_tokens,
            1 - objective.clip_low,
            1 + objective.clip_high,
            objective.dual_clip or 0.0,
            objective.kl_coef,
            objective.rollout_ratio_cap or math.inf,
            HAS_DUAL_CLIP=objective.dual_clip is not None,
            HAS_REF=inputs.ref_log_probs is not None,
            HAS_ROLLOUT=inputs.rollout_log_probs is not None,
            KL_ESTIMATOR=objective.kl_estimator,
            BLOCK=_BLOCK,
            **FUSED,
        )
    return TokenLoss(loss, kl, ratio, clipped), grad
