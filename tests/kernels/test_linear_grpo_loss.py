from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from vcr1_kernels import (
    Objective,
    grpo_token_loss,
    linear_grpo_loss,
    linear_log_probs,
    linear_objective_loss,
    reference,
)

from tests.kernels.accuracy import TOLERANCE, assert_accurate, gradients, to_float64

NUM_TOKENS, VOCAB_SIZE, HIDDEN_SIZE = 60, 501, 32
VARIANTS: dict[str, dict[str, Any]] = {
    "token": {},
    "token-dual-clip-k1": {"dual_clip": 1.3, "kl_estimator": "k1"},
    "token-entropy": {"entropy_coef": 0.3},
    "token-on-policy": {"old_log_probs": None, "rollout_ratio_cap": 1.1},
    "sequence": {"importance_level": "sequence"},
    "sequence-entropy": {"importance_level": "sequence", "entropy_coef": 0.3},
}


def _inputs(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    hidden = torch.randn(NUM_TOKENS, HIDDEN_SIZE).to(dtype)
    weight = (torch.randn(VOCAB_SIZE, HIDDEN_SIZE) / HIDDEN_SIZE**0.5).to(dtype)
    target_ids = torch.randint(VOCAB_SIZE, (NUM_TOKENS,))
    log_probs = reference.linear_log_probs(hidden.float(), weight.float(), target_ids, temperature=0.8)
    # Ratios are far enough from the clip bounds that rounding to half precision does not move one across a bound.
    old = log_probs - torch.tensor([-0.5, 0.0, 0.5])[torch.randint(3, (NUM_TOKENS,))] + 0.05 * torch.rand(NUM_TOKENS)
    named = {
        "advantages": torch.randn(NUM_TOKENS),
        "token_weights": torch.rand(NUM_TOKENS) / NUM_TOKENS,
        "old_log_probs": old,
        "ref_log_probs": log_probs + 0.2 * torch.randn(NUM_TOKENS),
        "rollout_log_probs": old + 0.2 * torch.randn(NUM_TOKENS),
        "segment_ids": torch.arange(NUM_TOKENS).div(9, rounding_mode="floor"),
    }
    if dtype == torch.float64:
        named = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in named.items()}
    return hidden.to(device), weight.to(device), target_ids.to(device), {k: v.to(device) for k, v in named.items()}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CPU_CHUNK_BYTES", "GPU_CHUNK_BYTES"):
        monkeypatch.setattr(f"vcr1_kernels.ops.linear_log_probs.{name}", 2**15)


def _reference_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    token_weights: Tensor,
    entropy_coef: float = 0.0,
    **options: Any,
) -> Tensor:
    log_probs, entropy = reference.linear_log_probs(hidden, weight, target_ids, temperature=0.8, return_entropy=True)
    return (token_weights * (reference.grpo_token_loss(log_probs, **options).loss - entropy_coef * entropy)).sum()


# gradcheck would run backward several times, which this op does not allow. The float64 case of this test replaces it.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_float64(variant: str, dtype: torch.dtype, device: torch.device) -> None:
    hidden, weight, target_ids, tensors = _inputs(dtype, device)
    options = {**tensors, **VARIANTS[variant]}
    exact_options = {
        name: (value.cpu().double() if value.is_floating_point() else value.cpu())
        if isinstance(value, Tensor)
        else value
        for name, value in options.items()
    }

    def op(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_grpo_loss(hidden, weight, target_ids, temperature=0.8, **options).loss

    def reference_op(hidden: Tensor, weight: Tensor) -> Tensor:
        return _reference_loss(hidden, weight, target_ids.cpu(), **exact_options)

    exact = to_float64(hidden, weight)
    # Terms of both signs cancel in the loss. Its error is compared with the size of its terms: the sum of the weights.
    error = abs(op(hidden, weight).item() - reference_op(*exact).item())
    assert error < TOLERANCE[dtype] * options["token_weights"].sum()
    for actual, expected in zip(gradients(op, [hidden, weight]), gradients(reference_op, exact), strict=True):
        assert actual.dtype == dtype
        assert_accurate(actual, expected, dtype)


@pytest.mark.parametrize("importance_level", ["token", "sequence"])
def test_metrics_match_the_two_separate_ops(importance_level: str, device: torch.device) -> None:
    hidden, weight, target_ids, tensors = _inputs(torch.float32, device)
    options = {**tensors, "importance_level": importance_level}
    result = linear_grpo_loss(hidden, weight, target_ids, return_entropy=True, **options)
    token_weights = options.pop("token_weights")
    log_probs, entropy = linear_log_probs(hidden, weight, target_ids, return_entropy=True)
    tokens = grpo_token_loss(log_probs, **options)
    torch.testing.assert_close(result.log_probs, log_probs)
    torch.testing.assert_close(result.entropy, entropy)
    torch.testing.assert_close(tuple(result.tokens), tuple(tokens))
    torch.testing.assert_close(result.loss, (token_weights * tokens.loss).sum())


@pytest.mark.parametrize("importance_level", ["token", "sequence"])
def test_keyword_form_equals_objective_form(importance_level: Any) -> None:
    hidden, weight, target_ids, tensors = _inputs(torch.float32, torch.device("cpu"))
    settings: dict[str, Any] = {
        "clip_low": 0.1,
        "clip_high": 0.3,
        "dual_clip": 2.0,
        "kl_coef": 0.5,
        "kl_estimator": "k2",
        "rollout_ratio_cap": 1.1,
        "importance_level": importance_level,
        "entropy_coef": 0.2,
    }
    with_keywords = linear_grpo_loss(hidden, weight, target_ids, **tensors, **settings)
    with_objective = linear_objective_loss(
        hidden, weight, target_ids, tensors.pop("advantages"), Objective(**settings), **tensors
    )
    assert torch.equal(with_keywords.loss, with_objective.loss)
    assert all(map(torch.equal, with_keywords.tokens, with_objective.tokens))


def test_tokens_with_zero_weight_change_nothing(device: torch.device) -> None:
    hidden, weight, target_ids, tensors = _inputs(torch.float32, device)
    tensors["token_weights"][::3] = 0
    kept = tensors["token_weights"] != 0

    def loss(hidden: Tensor, weight: Tensor, tokens: Any = slice(None)) -> Tensor:
        chosen = {name: tensor[tokens] for name, tensor in tensors.items()}
        return linear_grpo_loss(hidden[tokens], weight, target_ids[tokens], **chosen).loss

    padded = gradients(loss, [hidden, weight])
    torch.testing.assert_close(padded, gradients(lambda h, w: loss(h, w, kept), [hidden, weight]), rtol=1e-5, atol=1e-7)


def test_no_gradient_under_no_grad(device: torch.device) -> None:
    hidden, weight, target_ids, tensors = _inputs(torch.float32, device)
    trained = linear_grpo_loss(hidden, weight.requires_grad_(), target_ids, **tensors)
    with torch.no_grad():
        evaluated = linear_grpo_loss(hidden, weight, target_ids, **tensors)
    assert not evaluated.loss.requires_grad and trained.loss.requires_grad
    torch.testing.assert_close(evaluated.loss, trained.loss.detach())


def test_second_backward_raises(device: torch.device) -> None:
    hidden, weight, target_ids, tensors = _inputs(torch.float32, device)
    loss = linear_grpo_loss(hidden.requires_grad_(), weight, target_ids, **tensors).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("importance_level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradient_is_added_to_the_buffer(
    importance_level: str, dtype: torch.dtype, device: torch.device
) -> None:
    hidden, weight, target_ids, tensors = _inputs(dtype, device)
    options = {**tensors, "importance_level": importance_level}
    loss = linear_grpo_loss(hidden, weight.requires_grad_(), target_ids, **options).loss
    (expected,) = torch.autograd.grad(loss, weight)
    buffer = expected.float().clone()
    loss = linear_grpo_loss(hidden, weight, target_ids, **options, weight_grad=buffer).loss
    loss.backward()
    assert weight.grad is None
    assert_accurate(buffer, 2 * expected.double(), dtype)


def test_buffer_requires_a_loss_gradient_of_one_and_a_trainable_weight() -> None:
    hidden, weight, target_ids, tensors = _inputs(torch.float32, torch.device("cpu"))
    buffer = torch.zeros_like(weight)
    linear_grpo_loss(hidden.requires_grad_(), weight, target_ids, **tensors, weight_grad=buffer).loss.mul(2).backward()
    assert buffer.eq(0).all()
    loss = linear_grpo_loss(hidden, weight.requires_grad_(), target_ids, **tensors, weight_grad=buffer).loss
    with pytest.raises(ValueError, match="the gradient of a loss with weight_grad must be 1, got 2"):
        (2 * loss).backward()
    with pytest.raises(ValueError, match=r"weight_grad must be \[501, 32\]"):
        linear_grpo_loss(hidden, weight, target_ids, **tensors, weight_grad=buffer[1:])


def test_empty_input(device: torch.device) -> None:
    hidden, weight, target_ids, tensors = _inputs(torch.float32, device)
    empty = {name: tensor[:0] for name, tensor in tensors.items()}
    result = linear_grpo_loss(hidden[:0], weight.requires_grad_(), target_ids[:0], **empty)
    result.loss.backward()
    assert result.loss.item() == 0 and weight.grad is not None and weight.grad.eq(0).all()


def test_invalid_input_raises() -> None:
    hidden, weight, target_ids, tensors = _inputs(torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"token_weights must be \[60\]"):
        linear_grpo_loss(hidden, weight, target_ids, **{**tensors, "token_weights": torch.ones(())})
    with pytest.raises(ValueError, match="importance_level must be one of"):
        linear_grpo_loss(hidden, weight, target_ids, **tensors, importance_level="tokens")
