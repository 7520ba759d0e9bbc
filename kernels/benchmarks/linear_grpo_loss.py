"""Benchmark of linear_grpo_loss forward and backward: bound by three matmuls."""

from __future__ import annotations

import torch
from benchmarks.case import Case, backward, is_installed
from torch import Tensor
from vcr1_kernels import linear_grpo_loss


def cases(device: torch.device) -> list[Case]:
    """Return one case, forward + backward."""
    on_gpu = device.type == "cuda"
    num_tokens, vocab_size, hidden_size = (16384, 152064, 3584) if on_gpu else (2048, 32768, 512)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    hidden = torch.randn(num_tokens, hidden_size, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocab_size, hidden_size, device=device, dtype=dtype) / hidden_size**0.5).requires_grad_()
    target_ids = torch.randint(vocab_size, (num_tokens,), device=device)
    advantages = torch.randn(num_tokens, device=device)
    ref_log_probs = torch.full((num_tokens,), -11.0, device=device)
    token_weights = torch.full((num_tokens,), 1 / num_tokens, device=device)

    def ours() -> Tensor:
        return linear_grpo_loss(
            hidden, weight, target_ids, advantages, token_weights=token_weights, ref_log_probs=ref_log_probs
        ).loss

    def plain() -> Tensor:
        logits = (hidden @ weight.t()).float()
        log_probs = logits.log_softmax(-1).gather(-1, target_ids[:, None])[:, 0]
        ratio = (log_probs - log_probs.detach()).exp()
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        delta = ref_log_probs - log_probs
        return (token_weights * (0.04 * (delta.exp() - delta - 1) - surrogate)).sum()

    functions = {"vcr1_kernels": ours, "torch": plain}
    if on_gpu:
        functions["torch.compile"] = torch.compile(plain)
        if is_installed("liger_kernel"):
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            liger = LigerFusedLinearCrossEntropyLoss()
            functions["liger linear cross entropy (no RL loss)"] = lambda: liger(weight, hidden, target_ids)
    providers = {name: backward(function, hidden, weight) for name, function in functions.items()}
    shape = f"T={num_tokens} V={vocab_size} H={hidden_size} {dtype}"
    flops = 6 * num_tokens * vocab_size * hidden_size
    return [Case("linear_grpo_loss forward+backward", shape, providers, flops=flops)]
