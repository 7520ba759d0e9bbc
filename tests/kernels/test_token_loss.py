from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from vcr1_kernels import grpo_token_loss, reference

from tests.kernels.accuracy import assert_accurate, gradients, to_float64

NUM_TOKENS = 300
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "clip-higher": {"clip_low": 0.1, "clip_high": 0.4},
    "dual-clip": {"dual_clip": 1.5},
    "k1": {"kl_estimator": "k1"},
    "k2": {"kl_estimator": "k2"},
    "no-kl": {"ref_log_probs": None},
    "on-policy": {"old_log_probs": None},
    "rollout-capped": {"rollout_ratio_cap": 1.2},
    "sequence": {"importance_level": "sequence"},
    "sequence-on-policy": {"importance_level": "sequence", "old_log_probs": None},
    "all": {"importance_level": "sequence", "dual_clip": 1.1, "rollout_ratio_cap": 0.9, "clip_low": 0.05},
}


def _inputs(device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    log_probs = -torch.rand(NUM_TOKENS) * 3
    old = log_probs + 0.4 * torch.randn(NUM_TOKENS)
    named = {
        "advantages": torch.randn(NUM_TOKENS),
        "old_log_probs": old,
        "ref_log_probs": log_probs + 0.3 * torch.randn(NUM_TOKENS),
        "rollout_log_probs": old + 0.3 * torch.randn(NUM_TOKENS),
    }
    return log_probs.to(device), {name: tensor.to(device) for name, tensor in named.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_float64(variant: str, device: torch.device) -> None:
    log_probs, tensors = _inputs(device)
    segment_ids = torch.arange(NUM_TOKENS).div(7, rounding_mode="floor")
    options = {**tensors, "segment_ids": segment_ids.to(device), **VARIANTS[variant]}
    exact_options = {
        name: value.cpu().double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in options.items()
    } | {"segment_ids": segment_ids}
    actual = grpo_token_loss(log_probs, **options)
    expected = reference.grpo_token_loss(*to_float64(log_probs), **exact_options)
    for name in ("loss", "kl", "ratio"):
        assert_accurate(getattr(actual, name), getattr(expected, name), torch.float32)
    assert actual.clipped.cpu().equal(expected.clipped)
    if "clip" in variant:
        assert 0 < actual.clipped.float().mean() < 1  # the variant clips some tokens, but not all
    assert_accurate(
        gradients(lambda x: grpo_token_loss(x, **options).loss, [log_probs])[0],
        gradients(lambda x: reference.grpo_token_loss(x, **exact_options).loss, to_float64(log_probs))[0],
        torch.float32,
    )


def test_matches_values_computed_by_hand(device: torch.device) -> None:
    ratio = torch.tensor([1.1, 1.5, 0.5, 0.5, 4.0], dtype=torch.float32)
    result = grpo_token_loss(
        ratio.log().to(device),
        torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0], device=device),
        old_log_probs=torch.zeros(5, device=device),
        ref_log_probs=ratio.log().to(device) - math.log(2),
        dual_clip=3.0,
        kl_coef=0.1,
    )
    kl = 0.5 - 1 + math.log(2)  # k3 with reference / policy = 1/2
    surrogate = torch.tensor([2.2, 2.4, 1.0, -1.6, -6.0])
    torch.testing.assert_close(result.loss.cpu(), 0.1 * kl - surrogate, rtol=1e-6, atol=1e-6)
    assert result.clipped.tolist() == [False, True, False, True, True]
    torch.testing.assert_close(result.ratio.cpu(), ratio)


def test_on_policy_gradient_is_the_negative_advantage(device: torch.device) -> None:
    log_probs, tensors = _inputs(device)
    log_probs.requires_grad_()
    result = grpo_token_loss(log_probs, tensors["advantages"])
    result.loss.sum().backward()
    torch.testing.assert_close(log_probs.grad, -tensors["advantages"])
    assert result.ratio.eq(1).all() and not result.clipped.any() and result.kl.eq(0).all()


def test_k3_is_accurate_for_nearly_equal_policies(device: torch.device) -> None:
    delta = torch.tensor([1e-3, -1e-3, 9e-3, -9e-3, 2e-2, 0.0])
    log_probs = delta.to(device).requires_grad_()
    result = grpo_token_loss(
        log_probs, torch.zeros(6, device=device), ref_log_probs=torch.zeros(6, device=device), kl_coef=1.0
    )
    (grad,) = torch.autograd.grad(result.loss.sum(), log_probs)
    exact = delta.double()
    torch.testing.assert_close(grad.double().cpu(), 1 - (-exact).exp(), rtol=1e-5, atol=0)
    torch.testing.assert_close(result.kl.double().cpu(), (-exact).exp() + exact - 1, rtol=2e-3, atol=1e-9)


def test_sequence_ratio_is_the_geometric_mean_of_the_token_ratios(device: torch.device) -> None:
    log_probs = torch.tensor([0.1, 0.3, -0.2], device=device)
    result = grpo_token_loss(
        log_probs,
        torch.ones(3, device=device),
        old_log_probs=torch.zeros(3, device=device),
        importance_level="sequence",
        segment_ids=torch.tensor([2, 2, 0], device=device),
    )
    torch.testing.assert_close(result.ratio.cpu(), torch.tensor([0.2, 0.2, -0.2]).exp())


def test_gradcheck() -> None:
    log_probs, tensors = _inputs(torch.device("cpu"))
    exact = {name: tensor[:9].double() for name, tensor in tensors.items()}
    torch.autograd.gradcheck(lambda x: grpo_token_loss(x, **exact).loss, to_float64(log_probs[:9])[0].requires_grad_())


def test_empty_input(device: torch.device) -> None:
    nothing = torch.empty(0, device=device, requires_grad=True)
    grpo_token_loss(nothing, nothing.detach(), ref_log_probs=nothing.detach()).loss.sum().backward()
    assert nothing.grad is not None and nothing.grad.shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"advantages": torch.zeros(2)}, r"advantages must be \[3\], got \[2\]"),
        ({"old_log_probs": torch.zeros(3, 1)}, r"old_log_probs must be \[3\], got \[3, 1\]"),
        ({"kl_estimator": "k4"}, "kl_estimator must be one of"),
        ({"importance_level": "segment"}, "importance_level must be one of"),
        ({"importance_level": "sequence"}, "needs segment_ids"),
        ({"clip_low": 1.5}, "0 <= clip_low <= 1"),
        ({"dual_clip": 0.5}, "dual_clip must be greater than 1"),
        ({"rollout_ratio_cap": 0.0}, "rollout_ratio_cap must be positive"),
    ],
)
def test_invalid_input_raises(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grpo_token_loss(torch.zeros(3), **{"advantages": torch.zeros(3), **options})
