from __future__ import annotations

import pytest
import torch
from torch import Tensor
from vcr1_kernels.ops.softmax_rows import _merge, logit_gradient, row_softmax, row_statistics
from vcr1_kernels.records import RowSoftmax

from tests.kernels.accuracy import assert_accurate, to_float64

TEMPERATURE = 0.7


def _inputs(device: torch.device, num_tokens: int = 6, vocab_size: int = 300) -> tuple[Tensor, Tensor]:
    logits = 5 * torch.randn(num_tokens, vocab_size)
    return logits.to(device), torch.randint(vocab_size, (num_tokens,)).to(device)


def _softmax(logits: Tensor, target_ids: Tensor) -> RowSoftmax:
    statistics = row_statistics(logits, target_ids, first_id=0, temperature=TEMPERATURE, with_entropy=True)
    return row_softmax(statistics, TEMPERATURE, group=None)


def test_softmax_matches_torch(device: torch.device) -> None:
    logits, target_ids = _inputs(device)
    softmax = _softmax(logits, target_ids)
    (exact,) = to_float64(logits)
    distribution = torch.distributions.Categorical(logits=exact / TEMPERATURE)
    assert_accurate(softmax.max, exact.amax(-1), torch.float32)
    assert_accurate(softmax.log_probs, distribution.log_prob(target_ids.cpu()), torch.float32)
    assert_accurate(softmax.entropy, distribution.entropy(), torch.float32)


def test_statistics_of_shards_merge_into_those_of_the_row(device: torch.device) -> None:
    logits, target_ids = _inputs(device)
    logits[2, :100] = -torch.inf  # all logits of this row in the first shard
    logits[3, 100:] = -torch.inf  # all logits of this row in the second and third shards
    whole = row_statistics(logits, target_ids, first_id=0, temperature=TEMPERATURE, with_entropy=True)
    shards = [
        row_statistics(shard, target_ids, first_id=first_id, temperature=TEMPERATURE, with_entropy=True)
        for first_id, shard in zip((0, 100, 200), logits.split(100, dim=1), strict=True)
    ]
    merged = _merge(torch.stack([torch.stack(shard) for shard in shards]), TEMPERATURE)
    for actual, expected in zip(merged, whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_logit_gradient_matches_autograd(with_entropy: bool, inplace: bool, device: torch.device) -> None:
    logits, target_ids = _inputs(device)
    grad_log_probs = torch.randn(len(logits)).to(device)
    grad_entropy = torch.randn(len(logits)).to(device) if with_entropy else None
    exact = to_float64(logits)[0].requires_grad_()
    distribution = torch.distributions.Categorical(logits=exact / TEMPERATURE)
    objective = (to_float64(grad_log_probs)[0] * distribution.log_prob(target_ids.cpu())).sum()
    if grad_entropy is not None:
        objective = objective + (to_float64(grad_entropy)[0] * distribution.entropy()).sum()
    (expected,) = torch.autograd.grad(objective, exact)

    softmax = _softmax(logits, target_ids)
    out = logits if inplace else torch.full_like(logits, torch.nan)
    before = logits.clone()
    actual = logit_gradient(
        logits, target_ids, softmax, grad_log_probs, grad_entropy, first_id=0, temperature=TEMPERATURE, out=out
    )
    assert actual is out
    assert_accurate(actual, expected, torch.float32)
    if not inplace:
        assert torch.equal(logits, before)


def test_targets_in_another_shard_are_ignored(device: torch.device) -> None:
    logits, _ = _inputs(device)
    other_shard = torch.tensor([0, 1, 299, 600, 700, 900]).to(device)  # this shard holds the ids from 300 to 599
    statistics = row_statistics(logits, other_shard, first_id=300, temperature=1.0, with_entropy=False)
    assert statistics.target.eq(0).all()
    softmax = row_softmax(statistics, 1.0, group=None)
    grad = torch.ones(len(logits), device=device)
    gradient = logit_gradient(
        logits, other_shard, softmax, grad, None, first_id=300, temperature=1.0, out=torch.empty_like(logits)
    )
    assert_accurate(gradient, -to_float64(logits)[0].softmax(-1), torch.float32)
