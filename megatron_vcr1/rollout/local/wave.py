"""Waves of the in-process engine: a wave decodes a batch of responses, after prefilling their prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from vcr1_kernels import SegmentLayout

from megatron_vcr1.model.kv_cache import KVCache
from megatron_vcr1.model.packed_batch import PackedBatch
from megatron_vcr1.model.video_language_model import VideoLanguageModel
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.engine import GenerationRequest, SamplingParams
from megatron_vcr1.rollout.local.prefill import prefill
from megatron_vcr1.rollout.local.sampling import EndOfResponse, choose_tokens, response_uniforms
from megatron_vcr1.rollout.local.stages import broadcast_from_last_stage, forward_through_stages
from megatron_vcr1.types import FinishReason, Rollout

OnToken = Callable[[int, int, int], None]
"""Called with the index of a request, the index of its response, and a token, as soon as the token is sampled."""

# Finished responses stay in the batch until they make up this fraction of it, because removing them copies the KV cache
# of all other responses.
COMPACTION_FRACTION = 1 / 4


@dataclass(frozen=True, slots=True)
class WaveEntry:
    """Responses to one request that are in the same wave: the whole group, unless the group is larger than a wave.

    Attributes:
        request: index of the request.
        responses: indices of the responses within the group.
    """

    request: int
    responses: range


def plan_waves(requests: Sequence[GenerationRequest], max_batch_responses: int) -> list[list[WaveEntry]]:
    """Distribute the responses over waves of at most `max_batch_responses`, with prompts of similar length together.

    The cache pads all prompts of a wave to the longest of them, so similar lengths save memory. A group is split only
    if it is larger than a wave.
    """
    longest_first = sorted(range(len(requests)), key=lambda index: -len(requests[index].prompt.token_ids))
    waves: list[list[WaveEntry]] = []
    room = 0
    for index in longest_first:
        num_responses = requests[index].num_responses
        for first in range(0, num_responses, max_batch_responses):
            entry = WaveEntry(index, range(first, min(first + max_batch_responses, num_responses)))
            if len(entry.responses) > room:
                waves.append([])
                room = max_batch_responses
            waves[-1].append(entry)
            room -= len(entry.responses)
    return waves


@dataclass
class Response:
    """One response while it is decoded.

    Attributes:
        entry: index of its entry in the wave, and of its prompt in the KV cache.
        request: index of its request.
        index: its index within the group.
        token_ids, log_probs: the tokens that have been sampled so far.
        finish_reason: None while it is unfinished.
    """

    entry: int
    request: int
    index: int
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def rollout(self, policy_version: int) -> Rollout:
        """Return the finished response, tagged with the version of the weights that sampled it."""
        assert self.finish_reason is not None
        return Rollout(tuple(self.token_ids), tuple(self.log_probs), self.finish_reason, policy_version)


class Wave:
    """The responses of a wave, which are decoded together, with their KV cache.

    The tensor- and pipeline-parallel ranks of one context-parallel rank run a wave: `prefill`, then `decode`. The other
    context-parallel ranks take part in its prefill (`prefill.prefill`).

    The batch has one row per response. The prompt of an entry is computed once, and its rows share the keys and values
    of the prompt. Each decoding step computes the last token of every row and samples the next one. Finished rows are
    computed and ignored until there are enough of them to remove.
    """

    def __init__(
        self,
        model: VideoLanguageModel,
        requests: Sequence[GenerationRequest],
        entries: Sequence[WaveEntry],
        params: SamplingParams,
        never_sampled: Sequence[int],
    ) -> None:
        self._model = model
        self._params = params
        self._device = mesh.device()
        self._never_sampled = torch.tensor(never_sampled, device=self._device)
        self._requests = [requests[entry.request] for entry in entries]
        self._responses = [
            Response(number, entry.request, index) for number, entry in enumerate(entries) for index in entry.responses
        ]
        # The batch: the responses that a decoding step computes, one row each. Some of them may have finished.
        self._rows = list(self._responses)
        self._uniforms = torch.stack(
            [response_uniforms(requests[row.request].seed, row.index, params.max_new_tokens) for row in self._rows]
        ).to(self._device)
        self._seen = self._prompt_token_mask() if params.repetition_penalty != 1 else None
        self._cache = KVCache(
            [len(request.prompt.token_ids) for request in self._requests],
            [row.entry for row in self._rows],
            params.max_new_tokens - 1,  # the last token of a response is sampled, but never computed
            self._device,
        )
        # Set by `prefill`: the position of each row's first response token, int64 [rows], to which `_compute` adds the
        # step; and the hidden state that predicts the row's next token, on the last stage.
        self._positions: Tensor
        self._hidden: Tensor | None

    def prefill(self) -> None:
        """Compute the prompts, together with the other context-parallel ranks."""
        hidden, positions = prefill(self._model, self._requests, self._cache)
        entry_of_row = torch.tensor([row.entry for row in self._rows], device=self._device)
        self._positions = positions[entry_of_row]
        self._hidden = None if hidden is None else hidden[entry_of_row]

    def decode(self, end: EndOfResponse, on_token: OnToken | None = None) -> list[list[Response]]:
        """Decode until every response is finished, after `prefill`.

        Every rank sees the same tokens, so all ranks leave the loop after the same step.

        Args:
            end: the test of whether a response is complete.
            on_token: called for every token as soon as it is sampled.

        Returns:
            The responses of each entry.
        """
        for step in range(self._params.max_new_tokens):
            sampled = self._sample(step)
            self._record(sampled, end, on_token)
            unfinished = [row for row, response in enumerate(self._rows) if response.finish_reason is None]
            if not unfinished:
                break
            token_ids = sampled[0].long()
            if len(self._rows) - len(unfinished) >= COMPACTION_FRACTION * len(self._rows):
                token_ids = self._remove_finished(unfinished, token_ids)
            self._hidden = self._compute(token_ids, step)
        responses: list[list[Response]] = [[] for _ in self._requests]
        for response in self._responses:
            responses[response.entry].append(response)
        return responses

    def _prompt_token_mask(self) -> Tensor:
        """Mark the tokens that occur in the prompt of each row; bool [rows, vocab_size]."""
        seen = torch.zeros(len(self._rows), self._model.model_config.text.vocab_size, dtype=torch.bool)
        for row, response in zip(seen, self._rows, strict=True):
            row[self._requests[response.entry].prompt.token_ids] = True
        return seen.to(self._device)

    def _compute(self, token_ids: Tensor, step: int) -> Tensor | None:
        """Compute the token that each row sampled in this step; return its hidden state on the last stage."""
        num_rows = len(self._rows)
        empty = torch.empty(0, dtype=torch.long, device=self._device)
        batch = PackedBatch(
            token_ids=token_ids,
            position_ids=(self._positions + step).expand(3, -1),
            layout=SegmentLayout.packed((1,) * num_rows),
            vision=(),
            vision_token_indices=empty,
            predicting_token_indices=torch.arange(num_rows, device=self._device),
            target_ids=empty,
            response_lengths=(),
        )
        hidden = forward_through_stages(self._model, batch, self._cache)
        self._cache.advance()
        return hidden

    def _sample(self, step: int) -> Tensor:
        """Sample the next token of each row on the output rank, and broadcast it to the ranks that decode together.

        Returns:
            Token ids and log-probs, float64 [2, rows]. Float64 represents both exactly, so one broadcast is enough.
        """
        sampled = torch.empty(2, len(self._rows), dtype=torch.float64, device=self._device)
        if self._hidden is not None:
            logits = self._model.logits(self._hidden)
            sampled[0], sampled[1] = choose_tokens(
                logits, self._uniforms[:, step], self._params, self._never_sampled, self._seen
            )
        broadcast_from_last_stage(sampled)
        if self._seen is not None:
            self._seen.scatter_(1, sampled[0].long()[:, None], True)
        return sampled

    def _record(self, sampled: Tensor, end: EndOfResponse, on_token: OnToken | None) -> None:
        """Append the sampled tokens to the responses that are unfinished, and mark those that end with them."""
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

    def _remove_finished(self, unfinished: Sequence[int], token_ids: Tensor) -> Tensor:
        """Remove all rows but the unfinished ones from the batch and the cache; return the tokens of those rows."""
        index = torch.tensor(unfinished, device=self._device)
        self._rows = [self._rows[row] for row in unfinished]
        self._uniforms, self._positions = self._uniforms[index], self._positions[index]
        if self._seen is not None:
            self._seen = self._seen[index]
        self._cache.keep_responses(unfinished)
        return token_ids[index]
