"""Benchmark of log_probs_from_logits: memory-bound, one read forward, one read and one write backward."""

from __future__ import annotations

import torch
from benchmarks.case import Case, backward, is_installed, without_grad
from torch import Tensor
from vcr1_kernels import log_probs_from_logits


def cases(device: torch.device) -> list[Case]:
    """Return the cases forward and forward + backward."""
    num_tokens, vocab_size, dtype = (
        (16384, 152064, torch.bfloat16) if device.type == "cuda" else (512, 32768, torch.float32)
    )
    logits = torch.randn(num_tokens, vocab_size, device=device, dtype=dtype).requires_grad_()
    target_ids = torch.randint(vocab_size, (num_tokens,), device=device)
    weights = torch.randn(num_tokens, device=device)

    def ours() -> Tensor:
        return log_probs_from_logits(logits, target_ids)

    def transformers_style() -> Tensor:
        return logits.float().log_softmax(-1).gather(-1, target_ids[:, None])[:, 0]

    def logsumexp_style() -> Tensor:
        return logits.gather(-1, target_ids[:, None])[:, 0].float() - torch.logsumexp(logits.float(), dim=-1)

    functions = {"vcr1_kernels": ours, "torch": transformers_style, "torch logsumexp (TRL's way)": logsumexp_style}
    if device.type == "cuda":
        functions["torch.compile"] = torch.compile(transformers_style)
        if is_installed("liger_kernel"):
            from liger_kernel.transformers import LigerCrossEntropyLoss

            liger = LigerCrossEntropyLoss(reduction="none")
            functions["liger cross entropy"] = lambda: -liger(logits, target_ids)
        if is_installed("flash_attn"):
            from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

            functions["flash-attn cross entropy"] = lambda: -cross_entropy_loss(logits, target_ids)[0]
    shape = f"T={num_tokens} V={vocab_size} {dtype}"
    num_bytes = logits.numel() * logits.element_size()
    steps = {name: backward(lambda f=f: (f() * weights).sum(), logits) for name, f in functions.items()}
    return [
        Case("log_probs forward", shape, {n: without_grad(f) for n, f in functions.items()}, min_bytes=num_bytes),
        Case("log_probs forward+backward", shape, steps, min_bytes=3 * num_bytes),
    ]
