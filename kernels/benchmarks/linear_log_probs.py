"""Benchmark of linear_log_probs forward, as for a reference policy: bound by one matmul."""

from __future__ import annotations

import torch
from benchmarks.case import Case, without_grad
from torch import Tensor
from vcr1_kernels import linear_log_probs


def cases(device: torch.device) -> list[Case]:
    """Return one case, forward only."""
    on_gpu = device.type == "cuda"
    num_tokens, vocab_size, hidden_size = (16384, 152064, 3584) if on_gpu else (2048, 32768, 512)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    hidden = torch.randn(num_tokens, hidden_size, device=device, dtype=dtype)
    weight = torch.randn(vocab_size, hidden_size, device=device, dtype=dtype) / hidden_size**0.5
    target_ids = torch.randint(vocab_size, (num_tokens,), device=device)

    def plain() -> Tensor:
        return (hidden @ weight.t()).float().log_softmax(-1).gather(-1, target_ids[:, None])[:, 0]

    providers = {
        "vcr1_kernels": without_grad(lambda: linear_log_probs(hidden, weight, target_ids)),
        "torch": without_grad(plain),
    }
    if on_gpu:
        providers["torch.compile"] = without_grad(torch.compile(plain))
    shape = f"T={num_tokens} V={vocab_size} H={hidden_size} {dtype}"
    return [Case("linear_log_probs forward", shape, providers, flops=2 * num_tokens * vocab_size * hidden_size)]
