from __future__ import annotations

import torch
import torch.nn.functional as F
from vcr1_kernels import SegmentLayout, reference


def test_log_probs_match_cross_entropy_and_entropy_of_torch() -> None:
    logits, target_ids = 3 * torch.randn(9, 31, dtype=torch.float64), torch.randint(31, (9,))
    log_probs, entropy = reference.log_probs_from_logits(logits, target_ids, temperature=2.0, return_entropy=True)
    torch.testing.assert_close(log_probs, -F.cross_entropy(logits / 2, target_ids, reduction="none"))
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits / 2).entropy())


def test_log_probs_gradcheck() -> None:
    logits, target_ids = 3 * torch.randn(3, 7, dtype=torch.float64, requires_grad=True), torch.randint(7, (3,))
    torch.autograd.gradcheck(
        lambda x: reference.log_probs_from_logits(x, target_ids, temperature=0.7, return_entropy=True), logits
    )


def test_attention_mask_of_a_group() -> None:
    """A prompt of two tokens, then responses of two tokens and of one token."""
    mask = reference.attention_mask(SegmentLayout((2, 2, 1), (-1, 0, 0)))
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],
    ]


def test_attention_mask_of_windows() -> None:
    mask = reference.attention_mask(SegmentLayout.packed((1, 2), causal=False))
    assert mask.int().tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]


def test_swiglu_and_rms_norm_match_torch() -> None:
    gate_up = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(reference.swiglu(gate_up), F.silu(gate_up[:, :4]) * gate_up[:, 4:])
    x, weight = torch.randn(3, 8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-3), F.rms_norm(x, (8,), weight, 1e-3))
