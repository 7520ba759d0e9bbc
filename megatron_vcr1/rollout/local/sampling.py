"""From logits to tokens: mathematics alone, the same on every rank that is given the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_vcr1.rollout.engine import SamplingParams


def response_uniforms(seed: int, response_index: int, num_steps: int) -> Tensor:
    """Random numbers in [0, 1) of one response, one a step; float64 [num_steps].

    They depend on the three numbers alone, and a longer row begins with the shorter one: Philox is keyed, not advanced.
    """
    key = np.array([seed % 2**64, response_index], dtype=np.uint64)
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).random(num_steps))


def choose_tokens(
    logits: Tensor, uniforms: Tensor, params: SamplingParams, never_sampled: Tensor, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token for each row of logits.

    Args:
        logits: [rows, vocab_size].
        uniforms: float64 [rows], in [0, 1); at temperature 0 they are not read.
        never_sampled: int64 ids that are left out.
        seen: bool [rows, vocab_size], the tokens that the repetition penalty is about; None: no penalty.

    Returns:
        Token ids, int64 [rows], and their log-probs over the whole vocabulary at the temperature (at 0: at 1), without
        the penalty, float32 [rows].
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
    """Logits of seen tokens divided by the penalty, or multiplied where they are negative (CTRL, arXiv:1909.05858)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_likely(probs: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Zero all but the `top_k` most probable tokens (0: all), and of these all but the smallest set with `top_p` of
    their probability; [rows, vocab_size], not normalised.
    """
    vocab_size = probs.shape[-1]
    if top_p == 1 and not 0 < top_k < vocab_size:
        return probs
    likeliest, order = probs.topk(min(top_k or vocab_size, vocab_size))
    if top_p < 1:
        # A token stays while those before it have less than top_p; so the first always does.
        before = likeliest.cumsum(-1) - likeliest
        likeliest = likeliest.where(before < top_p * likeliest.sum(-1, keepdim=True), 0)
    return torch.zeros_like(probs).scatter_(-1, order, likeliest)


def invert_distribution(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The first token at which the cumulative probability exceeds the uniform number's share of the total.

    Args:
        probs: [rows, vocab_size], not necessarily normalised, not all zero.
        uniforms: float64 [rows], in [0, 1).

    Returns:
        int64 [rows]; a token of probability zero is never chosen. Where probabilities are not numbers, the last token:
        its log-prob is none either, which training notices.
    """
    cumulative = probs.cumsum(-1, dtype=torch.float64)  # in float32, rounding could pass over unlikely tokens
    total = cumulative[:, -1:]
    target = (uniforms[:, None] * total).minimum(total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)


@dataclass(frozen=True, slots=True)
class EndOfResponse:
    """Recognises a finished response by its last token.

    Attributes:
        end_token_ids: any of these ends it.
        stop: so does a text, with the token that completes it.
        decode: token ids to text, special tokens included.
    """

    end_token_ids: frozenset[int]
    stop: tuple[str, ...]
    decode: Callable[[Sequence[int]], str]

    def reached(self, token_ids: Sequence[int]) -> bool:
        """Whether the last token ends the response; it had not ended before."""
        if token_ids[-1] in self.end_token_ids:
            return True
        if not self.stop:
            return False
        # Every token has at least one byte, so a text that ends here began within as many tokens.
        longest = max(len(text.encode()) for text in self.stop)
        tail = self.decode(token_ids[-longest:])
        return any(text in tail for text in self.stop)
