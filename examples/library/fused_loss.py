"""The fused GRPO loss alone, compared with the same loss written out in PyTorch.

    python examples/library/fused_loss.py

Needs vcr1_kernels and torch only.
"""

from __future__ import annotations

import torch
from vcr1_kernels import linear_grpo_loss

VOCAB_SIZE, HIDDEN_SIZE = 1000, 64
RESPONSE_LENGTHS = torch.tensor([5, 9, 7, 3])  # one group of four responses
CLIP, KL_COEF = 0.2, 0.04


def main() -> None:
    torch.manual_seed(0)
    num_tokens = int(RESPONSE_LENGTHS.sum())
    hidden = torch.randn(num_tokens, HIDDEN_SIZE, requires_grad=True)
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE).div(8).requires_grad_()
    target_ids = torch.randint(VOCAB_SIZE, (num_tokens,))

    # Advantages relative to the group (equation 1), the same for all tokens of a response.
    rewards = torch.tensor([2.0, 0.5, 1.0, 0.0])
    advantages = ((rewards - rewards.mean()) / rewards.std()).repeat_interleave(RESPONSE_LENGTHS)

    # GRPO's mean over responses of the mean over tokens.
    token_weights = (1 / (len(RESPONSE_LENGTHS) * RESPONSE_LENGTHS)).repeat_interleave(RESPONSE_LENGTHS)

    with torch.no_grad():
        log_probs = log_probs_of(hidden, weight, target_ids)
        old_log_probs = log_probs + 0.1 * torch.randn(num_tokens)
        ref_log_probs = log_probs + 0.1 * torch.randn(num_tokens)

    fused = linear_grpo_loss(
        hidden,
        weight,
        target_ids,
        advantages,
        old_log_probs=old_log_probs,
        ref_log_probs=ref_log_probs,
        token_weights=token_weights,
        clip_low=CLIP,
        clip_high=CLIP,
        kl_coef=KL_COEF,
    )
    (fused_gradient,) = torch.autograd.grad(fused.loss, hidden)

    # The same, written out: equation 2 with the k3 estimate of the KL divergence.
    log_probs = log_probs_of(hidden, weight, target_ids)
    ratio = (log_probs - old_log_probs).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)
    log_ratio_ref = ref_log_probs - log_probs
    kl = log_ratio_ref.exp() - log_ratio_ref - 1
    loss = (token_weights * (KL_COEF * kl - surrogate)).sum()
    (gradient,) = torch.autograd.grad(loss, hidden)

    print(f"loss: fused {fused.loss:.6f}, written out {loss:.6f}")
    print(f"largest difference of the gradient: {(fused_gradient - gradient).abs().max():.1e}")
    torch.testing.assert_close(fused.loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fused_gradient, gradient, rtol=1e-4, atol=1e-6)


def log_probs_of(hidden: torch.Tensor, weight: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    """Return the log-prob of each target token; float32 [tokens]."""
    return (hidden @ weight.t()).log_softmax(-1).gather(-1, target_ids[:, None])[:, 0]


if __name__ == "__main__":
    main()
