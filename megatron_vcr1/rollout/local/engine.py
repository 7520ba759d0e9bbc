"""The in-process engine: the trained model itself samples the responses, and prefills each group's prompt once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import zip_longest

from torch import Tensor

from megatron_vcr1.model.video_language_model import VideoLanguageModel
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.parallel.balance import longest_first
from megatron_vcr1.rollout.engine import GenerationRequest, SamplingParams
from megatron_vcr1.rollout.local.prefill import prefill
from megatron_vcr1.rollout.local.sampling import EndOfResponse
from megatron_vcr1.rollout.local.stages import generation_mode
from megatron_vcr1.rollout.local.wave import OnToken, Wave, WaveEntry, plan_waves
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from megatron_vcr1.types import Rollout, RolloutGroup


class LocalEngine:
    """A `RolloutEngine` that uses the trained model itself, at any tensor-, context- and pipeline-parallel size.

    Context-parallel ranks prefill every prompt together. They hold the same weights, so each of them decodes the
    responses to a part of the requests by itself, as a replica would, and they exchange the responses. The KV cache of
    a prompt must therefore fit onto the tensor- and pipeline-parallel ranks of one context-parallel rank.

    Responses are decoded in waves of at most `max_batch_responses`. The responses to a request depend only on the
    request, not on the wave and not on the parallel layout, up to rounding in matmuls of other shapes.
    """

    def __init__(
        self,
        model: VideoLanguageModel,
        tokens: SpecialTokens,
        decode: Callable[[Sequence[int]], str],
        *,
        max_batch_responses: int,
    ) -> None:
        """
        Args:
            model: this rank's shard of the policy; `parallel.mesh` must be initialized for its layout.
            tokens: end tokens, and tokens that are never sampled.
            decode: converts token ids to text, special tokens included; only called if there are stop strings.
            max_batch_responses: maximum number of responses of a wave.
        """
        self._model = model
        self._tokens = tokens
        self._decode = decode
        self._max_batch_responses = max_batch_responses
        self._version = 0

    @property
    def policy_version(self) -> int:
        return self._version

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Record the version. The weights are those of the trained model already, so `tensors` is not iterated."""
        self._version = version

    def close(self) -> None:
        """Do nothing: the KV cache only lives during a call of `generate`."""

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, *, on_token: OnToken | None = None
    ) -> list[RolloutGroup]:
        """Sample the responses, as `RolloutEngine.generate` does.

        Args:
            requests: prompts and numbers of responses.
            params: sampling parameters.
            on_token: called for every token as soon as it is sampled, on every rank; not with context parallelism.

        Raises:
            ValueError: a prompt is empty, or its pads do not match its images and videos; names the request.
        """
        num_ranks = mesh.context_size()
        assert on_token is None or num_ranks == 1
        owners = longest_first([len(request.prompt.token_ids) for request in requests], num_ranks)
        shares = [
            [request for request, owner in zip(requests, owners, strict=True) if owner == rank]
            for rank in range(num_ranks)
        ]
        end = EndOfResponse(self._tokens.end, params.stop, self._decode)
        rollouts: list[list[list[Rollout]]] = [[[] for _ in share] for share in shares]
        cached_tokens: list[list[list[int]]] = [[[] for _ in share] for share in shares]
        waves = [plan_waves(share, self._max_batch_responses) for share in shares]
        with generation_mode(self._model):
            for entries_by_rank in zip_longest(*waves, fillvalue=()):  # the ranks prefill them together
                wave = self._prefill(entries_by_rank, shares, params)
                # A rank decodes alone. An error of one must reach the others before the next prefill, in which they
                # would wait for it.
                decoded = collectives.run_on_context_ranks(partial(self._decode_wave, wave, end, on_token))
                del wave  # its KV cache, before the next one is filled
                for rank, (entries, groups) in enumerate(zip(entries_by_rank, decoded, strict=True)):
                    for entry, group in zip(entries, groups, strict=True):
                        rollouts[rank][entry.request] += group
                        cached_tokens[rank][entry.request] += self._cached_tokens(entry, shares[rank][entry.request])
        # The share of each rank has the order of the requests.
        groups_by_rank = [
            iter(
                [
                    RolloutGroup(request.id, tuple(group), tuple(cached))
                    for request, group, cached in zip(*share, strict=True)
                ]
            )
            for share in zip(shares, rollouts, cached_tokens, strict=True)
        ]
        return [next(groups_by_rank[owner]) for owner in owners]

    def _decode_wave(self, wave: Wave | None, end: EndOfResponse, on_token: OnToken | None) -> list[list[Rollout]]:
        """Return the responses of each entry of this context-parallel rank's wave, if it has one."""
        if wave is None:
            return []
        return [[response.rollout(self._version) for response in group] for group in wave.decode(end, on_token)]

    def _prefill(
        self,
        entries_by_rank: Sequence[Sequence[WaveEntry]],
        shares: Sequence[Sequence[GenerationRequest]],
        params: SamplingParams,
    ) -> Wave | None:
        """Compute the prompts of every context-parallel rank's wave.

        Args:
            entries_by_rank: the entries of each rank's wave; none on ranks that have no wave left.
            shares: the requests of each rank.

        Returns:
            This rank's wave.
        """
        wave: Wave | None = None
        for rank, (entries, requests) in enumerate(zip(entries_by_rank, shares, strict=True)):
            if not entries:
                continue
            if rank == mesh.context_rank():
                wave = Wave(self._model, requests, entries, params, self._tokens.never_sampled)
                wave.prefill()
            else:
                prefill(self._model, [requests[entry.request] for entry in entries], cache=None)
        return wave

    @staticmethod
    def _cached_tokens(entry: WaveEntry, request: GenerationRequest) -> list[int]:
        """Return the prompt tokens that each response found in the cache: none for the first, all for the others."""
        return [0] + [len(request.prompt.token_ids)] * (len(entry.responses) - 1)
