"""Sampling of tokens from logits: pure functions, deterministic for equal inputs, without collectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_vcr1.rollout.engine import SamplingParams


def response_uniforms(seed: int, response_index: int, num_steps: int) -> Tensor:
    """Draw the random numbers of one response, one per decoding step.

    They depend only on the arguments, so a response does not depend on what else is decoded. A larger `num_steps` gives
    the same numbers followed by more of them. Philox is a counter-based generator: the key selects the sequence.

    Args:
        seed: seed of the request; may be negative.
        response_index: index of the response within its group.
        num_steps: maximum number of tokens of the response.

    Returns:
        float64 [num_steps], in [0, 1).
    """
    key = np.array([seed % 2**64, response_index], dtype=np.uint64)
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).random(num_steps))


def choose_tokens(
    logits: Tensor, uniforms: Tensor, params: SamplingParams, never_sampled: Tensor, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sample one token per response.

    The steps, in order: repetition penalty, temperature, excluded tokens, top-k, top-p.

    Args:
        logits: [responses, vocab_size].
        uniforms: float64 [responses], in [0, 1); not read at temperature 0.
        params: temperature, top_k, top_p and repetition_penalty.
        never_sampled: int64 ids of tokens that are excluded.
        seen: bool [responses, vocab_size], the tokens that the repetition penalty applies to; None: no penalty.

    Returns:
        Token ids, int64 [responses], and their log-probs, float32 [responses]. The log-probs are over the whole
        vocabulary, at the sampling temperature (at temperature 0: at temperature 1), and without the penalty.
    """
    logits = logits.float()
    temperature = params.temperature or 1.0
    scores = log_probs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
    if seen is not None:
        scores = penalize(logits, seen, params.repetition_penalty) / temperature
    allowed = scores.index_fill(-1, never_sampled, -torch.inf)
    if params.temperature == 0:
        token_ids = allowed.argmax(-1)
    else:
        probs = keep_likely(allowed.softmax(-1), top_k=params.top_k, top_p=params.top_p)
        token_ids = invert_distribution(probs, uniforms)
    return token_ids, log_probs.gather(-1, token_ids[:, None])[:, 0]


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide the logits of seen tokens by the penalty, or multiply negative ones by it (CTRL, arXiv:1909.05858)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_likely(probs: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Set the probability of unlikely tokens to zero: top-k first, then top-p among the tokens that are left.

    Args:
        probs: [responses, vocab_size].
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of the remaining tokens that has this share of their probability.

    Returns:
        [responses, vocab_size], not normalized.
    """
    vocab_size = probs.shape[-1]
    if top_p == 1 and not 0 < top_k < vocab_size:
        return probs
    likeliest, order = probs.topk(min(top_k or vocab_size, vocab_size))
    if top_p < 1:
        # Keep a token while the tokens before it have less than top_p together. The first token is always kept.
        before = _cumulative_sum(likeliest) - likeliest
        likeliest = likeliest.where(before < top_p * likeliest.sum(-1, keepdim=True), 0)
    return torch.zeros_like(probs).scatter_(-1, order, likeliest)


def invert_distribution(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Sample by inverting the cumulative distribution: the first token at which it exceeds `uniform * total`.

    Args:
        probs: [responses, vocab_size], not necessarily normalized, not all zero.
        uniforms: float64 [responses], in [0, 1).

    Returns:
        int64 [responses]. A token of probability zero is never chosen. If the probabilities are NaN, the last token is
        chosen; its log-prob is NaN too, which training detects.
    """
    cumulative = _cumulative_sum(probs.double())  # in float32, rounding could skip unlikely tokens
    total = cumulative[:, -1:]
    # The product can round up to the total, at which no token would be found: stay just below it.
    target = (uniforms[:, None] * total).minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)


def _cumulative_sum(values: Tensor) -> Tensor:
    """Return the cumulative sum over the last dimension.

    CUDA has no deterministic algorithm for it: where one is required, the host computes it, which is slow.
    """
    if values.is_cuda and torch.are_deterministic_algorithms_enabled():
        return values.cpu().cumsum(-1).to(values.device)
    return values.cumsum(-1)


@dataclass(frozen=True, slots=True)
class EndOfResponse:
    """A test of whether a response is complete.

    Attributes:
        end_token_ids: tokens that end a response.
        stop: strings that end a response, with the token that completes the string.
        decode: converts token ids to text, special tokens included.
    """

    end_token_ids: frozenset[int]
    stop: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]

    def reached(self, token_ids: Sequence[int]) -> bool:
        """Return whether the last token ends the response. Call it for every token: earlier tokens are not checked."""
        if token_ids[-1] in self.end_token_ids:
            return True
        if not self.stop:
            return False
        # A token is at least one byte long, so a stop string of n bytes is within the last n tokens.
        longest = max(len(text.encode()) for text in self.stop)
        tail = self.decode(token_ids[-longest:])
        return any(text in tail for text in self.stop)
