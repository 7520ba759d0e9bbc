"""Compares sampling with transformers' filters and with exact inversion, and tests distributions with chi-square."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper
from vcr1_kernels import reference

from megatron_vcr1.rollout.engine import SamplingParams
from megatron_vcr1.rollout.local.sampling import (
    EndOfResponse,
    choose_tokens,
    invert_distribution,
    keep_likely,
    penalize,
    response_uniforms,
)

LARGEST_BELOW_ONE = math.nextafter(1.0, 0.0)


def _logits(num_rows: int, vocab_size: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(seed))


def test_uniforms_depend_only_on_seed_and_response() -> None:
    row = response_uniforms(7, 2, 100)
    assert torch.equal(response_uniforms(7, 2, 10), row[:10]), "a longer limit must not change the tokens"
    assert not torch.equal(response_uniforms(7, 3, 100), row)
    assert not torch.equal(response_uniforms(8, 2, 100), row)
    assert not torch.equal(response_uniforms(-7, 2, 100), row)
    assert row.dtype == torch.float64 and float(row.min()) >= 0 and float(row.max()) < 1


def test_inversion_reproduces_every_probability() -> None:
    """Uniforms on a regular grid select each token as often as its probability says, within one."""
    probs = _logits(1, 40).softmax(-1)
    num = 100_000
    uniforms = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    token_ids = invert_distribution(probs.expand(num, -1), uniforms)
    counts = torch.bincount(token_ids, minlength=40)
    assert float((counts - num * probs[0].double()).abs().max()) <= 1


@pytest.mark.parametrize("uniform", [0.0, 0.3, 0.9999999, LARGEST_BELOW_ONE])
def test_a_token_of_probability_zero_is_never_chosen(uniform: float) -> None:
    probs = torch.tensor([[0.0, 0.0, 1e-30, 0.0, 0.25, 0.0, 1e-9, 0.0, 0.0]])
    token_id = invert_distribution(probs, torch.tensor([uniform], dtype=torch.float64))
    assert float(probs[0, token_id]) > 0


@pytest.mark.parametrize("vocab_size", [64, 1000])
def test_inversion_equals_a_search_in_the_cumulative_sums(vocab_size: int) -> None:
    """Includes many tokens of probability zero, and a last token that is hardly ever chosen."""
    probs = _logits(500, vocab_size, seed=5).softmax(-1)
    probs[_logits(500, vocab_size, seed=6) < 2] = 0
    probs[:, -1] = 1e-20
    uniforms = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    uniforms[:2] = torch.tensor([0, LARGEST_BELOW_ONE])
    token_ids = invert_distribution(probs, uniforms)
    cumulative = probs.double().cumsum(-1)
    expected = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)[:, 0]
    assert torch.equal(token_ids[:1], expected[:1]) and torch.equal(token_ids[2:], expected[2:])
    assert bool((probs.gather(1, token_ids[:, None]) > 0).all())
    for_nan = invert_distribution(torch.full_like(probs, torch.nan), uniforms)
    assert bool((for_nan == vocab_size - 1).all())


def test_sampled_distribution_is_the_softmax_at_the_temperature() -> None:
    """Chi-square test: 30 tokens, three of them excluded, 60,000 draws; the 0.999 quantile at 26 degrees is 54.1."""
    logits, never, temperature = _logits(1, 30, seed=1) / 3, torch.tensor([3, 4, 29]), 0.8
    uniforms = torch.cat([response_uniforms(seed, index, 100) for seed in range(60) for index in range(10)])
    params = SamplingParams(max_new_tokens=1, temperature=temperature)
    token_ids, _ = choose_tokens(logits.expand(len(uniforms), -1), uniforms, params, never)
    counts = torch.bincount(token_ids, minlength=30).double()
    expected = (logits[0].double() / temperature).index_fill(0, never, -torch.inf).softmax(0) * len(uniforms)
    assert not counts[never].any()
    allowed = expected > 0
    assert float(((counts - expected)[allowed] ** 2 / expected[allowed]).sum()) < 54.1


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (5, 1.0), (0, 0.7), (0, 1e-9), (5, 0.6), (1, 0.5), (900, 0.95)])
def test_top_k_and_top_p_equal_transformers(top_k: int, top_p: float) -> None:
    logits = _logits(6, 300, seed=2)
    warped = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    expected = TopPLogitsWarper(top_p)(None, warped).softmax(-1)
    kept = keep_likely(logits.softmax(-1), top_k=top_k, top_p=top_p)
    torch.testing.assert_close(kept / kept.sum(-1, keepdim=True), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0, 4.0])
def test_log_probs_are_over_the_whole_vocabulary(temperature: float) -> None:
    """Log-probs are those before any token is excluded; greedy decoding reports them at temperature 1."""
    logits, never = _logits(50, 80, seed=3), torch.tensor([0, 17])
    params = SamplingParams(max_new_tokens=1, temperature=temperature, top_k=4, top_p=0.8)
    token_ids, log_probs = choose_tokens(logits, response_uniforms(0, 0, 50), params, never)
    expected = reference.log_probs_from_logits(logits, token_ids, temperature=temperature or 1.0)
    torch.testing.assert_close(log_probs, expected, atol=1e-6, rtol=1e-6)
    assert not torch.isin(token_ids, never).any()
    if temperature == 0:
        assert torch.equal(token_ids, logits.index_fill(-1, never, -torch.inf).argmax(-1))


def test_the_repetition_penalty_equals_transformers_and_does_not_change_log_probs() -> None:
    logits, nothing = _logits(20, 60, seed=4), torch.tensor([], dtype=torch.long)
    token_ids = torch.randint(0, 60, (20, 15), generator=torch.Generator().manual_seed(5))
    seen = torch.zeros(20, 60, dtype=torch.bool).scatter_(1, token_ids, True)
    expected = RepetitionPenaltyLogitsProcessor(1.3)(token_ids, logits.clone())
    assert torch.equal(penalize(logits, seen, 1.3), expected)
    greedy = SamplingParams(max_new_tokens=1, temperature=0, repetition_penalty=1.3)
    chosen, log_probs = choose_tokens(logits, response_uniforms(0, 0, 20), greedy, nothing, seen)
    assert torch.equal(chosen, expected.argmax(-1))
    assert not torch.equal(chosen, logits.argmax(-1))
    torch.testing.assert_close(log_probs, reference.log_probs_from_logits(logits, chosen))
    sharp = SamplingParams(max_new_tokens=1, temperature=1e-3, repetition_penalty=1.3)
    assert torch.equal(choose_tokens(logits, response_uniforms(0, 0, 20), sharp, nothing, seen)[0], chosen)


def _decode(token_ids: object) -> str:
    """Decode a vocabulary in which every byte is a token."""
    return bytes(token_ids).decode("utf-8", errors="replace")  # type: ignore[call-overload]


@pytest.mark.parametrize("stop", [("</answer>",), ("nowhere", "é!"), ("中",)])
def test_a_response_ends_with_the_token_that_completes_a_stop_string(stop: tuple[str, ...]) -> None:
    end = EndOfResponse(frozenset({0}), stop, _decode)
    token_ids = list(f"<answer>中 {stop[-1]} and more".encode())
    ended = [end.reached(token_ids[: n + 1]) for n in range(len(token_ids))]
    first = ended.index(True)
    assert _decode(token_ids[: first + 1]).endswith(stop[-1])
    assert not any(ended[:first])


def test_end_tokens_end_a_response_without_decoding() -> None:
    end = EndOfResponse(frozenset({5, 6}), (), lambda token_ids: pytest.fail("decoded without stop strings"))
    assert [end.reached([1, token_id]) for token_id in (4, 5, 6)] == [False, True, True]
