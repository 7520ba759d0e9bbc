from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from vcr1_kernels import log_probs_from_logits, reference

from tests.kernels.accuracy import assert_accurate, gradients, to_float64


def _inputs(num_tokens: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(num_tokens, vocab_size)
    return logits.to(device, dtype), torch.randint(vocab_size, (num_tokens,)).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_tokens, vocab_size", [(1, 1), (1, 20001), (37, 1023), (3, 8192)])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_matches_float64(
    num_tokens: int, vocab_size: int, dtype: torch.dtype, temperature: float, device: torch.device
) -> None:
    logits, target_ids = _inputs(num_tokens, vocab_size, dtype, device)

    def op(logits: Tensor) -> tuple[Tensor, Tensor]:
        return log_probs_from_logits(logits, target_ids, temperature=temperature, return_entropy=True)

    def reference_op(logits: Tensor) -> tuple[Tensor, Tensor]:
        return reference.log_probs_from_logits(logits, target_ids.cpu(), temperature=temperature, return_entropy=True)

    # The statistics are float32 for every dtype of the logits; only the gradients are rounded to that dtype.
    for actual, expected in zip(op(logits), reference_op(*to_float64(logits)), strict=True):
        assert_accurate(actual, expected, torch.float32)
    assert_accurate(gradients(op, [logits])[0], gradients(reference_op, to_float64(logits))[0], dtype)


def test_gradcheck() -> None:
    logits, target_ids = _inputs(3, 7, torch.float64, torch.device("cpu"))
    torch.autograd.gradcheck(
        lambda x: log_probs_from_logits(x, target_ids, temperature=0.7, return_entropy=True), logits.requires_grad_()
    )


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy in the interpreter: -3e38 / 0.8
def test_extreme_logits_and_masked_entries(device: torch.device) -> None:
    logits = torch.randn(5, 3000)
    logits[0] += 1e4  # an offset of the whole row changes nothing
    logits[1, 7] = 1e4  # one token has probability 1
    logits[2, ::2] = -math.inf  # masked entries
    logits[3, 1000:] = -3e38  # masked with a large negative number, as transformers does
    target_ids = torch.tensor([5, 7, 11, 12, 13], device=device)
    logits = logits.to(device)

    def op(logits: Tensor) -> tuple[Tensor, Tensor]:
        return log_probs_from_logits(logits, target_ids, temperature=0.8, return_entropy=True)

    def reference_op(logits: Tensor) -> tuple[Tensor, Tensor]:
        return reference.log_probs_from_logits(logits, target_ids.cpu(), temperature=0.8, return_entropy=True)

    for actual, expected in zip(op(logits), reference_op(*to_float64(logits)), strict=True):
        for row in range(5):
            assert_accurate(actual[row], expected[row], torch.float32)
    assert_accurate(gradients(op, [logits])[0], gradients(reference_op, to_float64(logits))[0], torch.float32)


def test_tokens_without_a_finite_logit(device: torch.device) -> None:
    logits = torch.full((2, 40), -math.inf, device=device)
    logits[1, 3] = 0.5  # the only token with a non-zero probability
    logits.requires_grad_()
    log_probs, entropy = log_probs_from_logits(logits, torch.tensor([1, 3], device=device), return_entropy=True)
    assert log_probs.tolist() == [-math.inf, 0.0]
    assert entropy.tolist() == [0.0, 0.0]
    entropy.sum().backward()
    assert logits.grad is not None and logits.grad.eq(0).all()


def test_inplace_backward_overwrites_the_logits(device: torch.device) -> None:
    logits, target_ids = _inputs(6, 500, torch.float32, device)
    expected = gradients(lambda x: log_probs_from_logits(x, target_ids), [logits])[0]
    leaf = logits.clone().requires_grad_()
    produced = leaf * 1
    produced.retain_grad()
    log_probs = log_probs_from_logits(produced, target_ids, inplace_backward=True)
    torch.manual_seed(2)
    (probe,) = gradients(lambda x: x, [log_probs])
    log_probs.backward(probe, retain_graph=True)
    torch.testing.assert_close(leaf.grad, expected)
    torch.testing.assert_close(produced.detach(), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_probs.backward(probe)


def test_logits_may_be_columns_of_a_larger_tensor(device: torch.device) -> None:
    padded, target_ids = _inputs(5, 130, torch.float32, device)
    view = padded[:, 3:103]
    target_ids = target_ids % 100
    torch.testing.assert_close(
        log_probs_from_logits(view, target_ids), log_probs_from_logits(view.contiguous(), target_ids)
    )


def test_empty_input(device: torch.device) -> None:
    logits, target_ids = _inputs(0, 12, torch.float32, device)
    log_probs = log_probs_from_logits(logits.requires_grad_(), target_ids)
    log_probs.sum().backward()
    assert log_probs.shape == (0,) and logits.grad is not None and logits.grad.shape == (0, 12)


@pytest.mark.parametrize(
    ("logits", "target_ids", "temperature", "message"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), 1.0, r"logits must be \[tokens, vocab_shard\]"),
        (torch.zeros(3, 4), torch.zeros(2, dtype=torch.int64), 1.0, r"target_ids must be \[3\], got \[2\]"),
        (torch.zeros(3, 4), torch.zeros(3), 1.0, "target_ids must be int64"),
        (torch.zeros(3, 4), torch.tensor([0, 4, 0]), 1.0, r"target_ids\[1\] is 4, outside the vocabulary of 4"),
        (torch.zeros(3, 4), torch.tensor([0, 0, -100]), 1.0, r"target_ids\[2\] is -100"),
        (torch.zeros(4, 3).t(), torch.zeros(3, dtype=torch.int64), 1.0, "must be contiguous"),
        (torch.zeros(3, 4).long(), torch.zeros(3, dtype=torch.int64), 1.0, "must be a floating-point tensor"),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), 0.0, "temperature must be positive"),
    ],
)
def test_invalid_input_raises(logits: Tensor, target_ids: Tensor, temperature: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        log_probs_from_logits(logits, target_ids, temperature=temperature)
