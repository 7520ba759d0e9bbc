"""Responses that decode together: prompts in passes of bounded size, then a token a response and pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from vcr1_kernels import SegmentLayout

from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.kv_cache import KVCache, PrefillAttention
from megatron_vcr1.model.packed_batch import PackedBatch, pack
from megatron_vcr1.model.qwen_vl import QwenVLModel
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.engine import GenerationRequest, SamplingParams
from megatron_vcr1.rollout.local.sampling import EndOfResponse, choose_tokens, response_uniforms
from megatron_vcr1.rollout.local.stages import broadcast_from_last_stage, forward_over_stages
from megatron_vcr1.types import FinishReason, Rollout

OnToken = Callable[[int, int, int], None]
"""Called with the index of a request, the index of its response, and a token, as soon as it is sampled."""

# Prompt tokens of one pass: enough to fill a GPU. A longer prompt has a pass of its own.
PROMPT_PASS_TOKENS = 16384
# Finished rows leave once they are this share of all: whenever some leave, the memory of the others is copied.
LEAVING_SHARE = 1 / 4


@dataclass(frozen=True, slots=True)
class Part:
    """Responses to one request that share a wave, and its prompt there: all of them, if a wave has room."""

    request: int  # its index
    responses: range  # their indices within the group


def plan_waves(requests: Sequence[GenerationRequest], max_batch_responses: int) -> list[list[Part]]:
    """Divide the responses into waves of at most `max_batch_responses`, prompts of similar length together.

    A group is divided only where it is larger than a wave.
    """
    by_length = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt.token_ids))
    waves: list[list[Part]] = []
    room = 0
    for index in by_length:
        num_responses = requests[index].num_responses
        for first in range(0, num_responses, max_batch_responses):
            part = Part(index, range(first, min(first + max_batch_responses, num_responses)))
            if len(part.responses) > room:
                waves.append([])
                room = max_batch_responses
            waves[-1].append(part)
            room -= len(part.responses)
    return waves


@dataclass
class Response:
    """One response under way."""

    part: int  # index of its part in the wave
    request: int
    index: int  # among the request's responses
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def rollout(self, policy_version: int) -> Rollout:
        assert self.finish_reason is not None
        return Rollout(tuple(self.token_ids), tuple(self.log_probs), self.finish_reason, policy_version)


class Wave:
    """The parts of a wave and their memory; the ranks of a copy of the model run it together."""

    def __init__(
        self,
        model: QwenVLModel,
        requests: Sequence[GenerationRequest],
        parts: Sequence[Part],
        params: SamplingParams,
        never_sampled: Sequence[int],
    ) -> None:
        self._model = model
        self._params = params
        self._device = mesh.device()
        self._never_sampled = torch.tensor(never_sampled, device=self._device)
        self._requests = [requests[part.request] for part in parts]
        self._responses = [Response(p, part.request, i) for p, part in enumerate(parts) for i in part.responses]
        self._rows = list(self._responses)  # those that a pass computes; some may have finished
        self._uniforms = torch.stack(
            [response_uniforms(requests[one.request].seed, one.index, params.max_new_tokens) for one in self._rows]
        ).to(self._device)
        self._seen = self._prompt_tokens() if params.repetition_penalty != 1 else None
        self._cache = KVCache(
            [len(one.prompt.token_ids) for one in self._requests],
            [one.part for one in self._rows],
            params.max_new_tokens - 1,
            self._device,
        )

    def run(self, end: EndOfResponse, on_token: OnToken | None = None) -> list[list[Response]]:
        """Decode to the end.

        Args:
            end: recognises a finished response.
            on_token: told of every token as it comes.

        Returns:
            The responses of each part.
        """
        hidden = self._read_prompts()
        for step in range(self._params.max_new_tokens):
            sampled = self._sample(hidden, step)
            self._record(sampled, end, on_token)
            live = [row for row, one in enumerate(self._rows) if one.finish_reason is None]
            if not live:
                break
            fed = sampled[0].long()
            if len(self._rows) - len(live) >= LEAVING_SHARE * len(self._rows):
                fed = self._let_go(live, fed)
            hidden = self._read_tokens(fed, step)
        answers: list[list[Response]] = [[] for _ in self._requests]
        for response in self._responses:
            answers[response.part].append(response)
        return answers

    def _prompt_tokens(self) -> Tensor:
        """Which tokens stand in each row's prompt; bool [rows, vocab_size]."""
        seen = torch.zeros(len(self._rows), self._model.model_config.text.vocab_size, dtype=torch.bool)
        for row, response in zip(seen, self._rows, strict=True):
            row[self._requests[response.part].prompt.token_ids] = True
        return seen.to(self._device)

    def _read_prompts(self) -> Tensor | None:
        """Compute every prompt once; the hidden state behind each row's prompt on the last stage."""
        hidden, positions = [], []
        for parts in self._prompt_passes():
            # A token behind each prompt: packed, it adds no row, and has its prompt's last row predict it.
            one_token = torch.zeros(1, dtype=torch.long)
            packed = [Group(self._requests[p].id, self._requests[p].prompt, (one_token,)) for p in parts]
            batch = pack(packed, self._model.model_config).to(self._device)
            positions.append(batch.position_ids[:, batch.predicting_token_indices].amax(0) + 1)
            output = forward_over_stages(self._model, batch, PrefillAttention(self._cache, parts))
            if output is not None:
                hidden.append(output)
        part_of_row = torch.tensor([one.part for one in self._rows], device=self._device)
        self._positions = torch.cat(positions)[part_of_row]
        return torch.cat(hidden)[part_of_row] if hidden else None

    def _prompt_passes(self) -> Iterator[range]:
        """Parts whose prompts are computed in one pass."""
        first, num_tokens = 0, 0
        for part, request in enumerate(self._requests):
            length = len(request.prompt.token_ids)
            if part > first and num_tokens + length > PROMPT_PASS_TOKENS:
                yield range(first, part)
                first, num_tokens = part, 0
            num_tokens += length
        yield range(first, len(self._requests))

    def _read_tokens(self, token_ids: Tensor, step: int) -> Tensor | None:
        """Feed the rows their token of this step; the hidden state behind it on the last stage."""
        num_rows = len(self._rows)
        nothing = torch.empty(0, dtype=torch.long, device=self._device)
        batch = PackedBatch(
            token_ids=token_ids,
            position_ids=(self._positions + step).expand(3, -1),
            layout=SegmentLayout.packed((1,) * num_rows),
            vision=(),
            vision_token_indices=nothing,
            predicting_token_indices=torch.arange(num_rows, device=self._device),
            target_ids=nothing,
            response_lengths=(),
        )
        hidden = forward_over_stages(self._model, batch, self._cache)
        self._cache.advance()
        return hidden

    def _sample(self, hidden: Tensor | None, step: int) -> Tensor:
        """Token ids and log-probs of the rows, float64 [2, rows] (both exact in it), the same on all ranks."""
        sampled = torch.empty(2, len(self._rows), dtype=torch.float64, device=self._device)
        if hidden is not None:
            logits = self._model.logits(hidden)
            sampled[0], sampled[1] = choose_tokens(
                logits, self._uniforms[:, step], self._params, self._never_sampled, self._seen
            )
        broadcast_from_last_stage(sampled)
        if self._seen is not None:
            self._seen.scatter_(1, sampled[0].long()[:, None], True)
        return sampled

    def _record(self, sampled: Tensor, end: EndOfResponse, on_token: OnToken | None) -> None:
        for response, token_id, log_prob in zip(self._rows, *sampled.tolist(), strict=True):
            if response.finish_reason is not None:
                continue
            response.token_ids.append(int(token_id))
            response.log_probs.append(log_prob)
            if end.reached(response.token_ids):
                response.finish_reason = FinishReason.STOP
            elif len(response.token_ids) == self._params.max_new_tokens:
                response.finish_reason = FinishReason.LENGTH
            if on_token is not None:
                on_token(response.request, response.index, response.token_ids[-1])

    def _let_go(self, live: Sequence[int], fed: Tensor) -> Tensor:
        """Keep the live rows alone; returns what they are fed."""
        index = torch.tensor(live, device=self._device)
        self._rows = [self._rows[row] for row in live]
        self._uniforms, self._positions = self._uniforms[index], self._positions[index]
        if self._seen is not None:
            self._seen = self._seen[index]
        self._cache.keep_responses(live)
        return fed[index]
