"""The in-process engine: the trained model itself samples, with a KV cache, a group's prompt computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from megatron_vcr1.model.qwen_vl import QwenVLModel
from megatron_vcr1.rollout.engine import GenerationRequest, SamplingParams
from megatron_vcr1.rollout.local.sampling import EndOfResponse
from megatron_vcr1.rollout.local.stages import generating
from megatron_vcr1.rollout.local.wave import OnToken, Part, Wave, plan_waves
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from megatron_vcr1.types import Rollout, RolloutGroup


class LocalEngine:
    """A `RolloutEngine` on the model that is trained, at any tensor- and pipeline-parallel size.

    Responses decode in waves of at most `max_batch_responses`. What is sampled for a request depends on it alone (up to
    rounding in products of other sizes), neither on the wave nor on the layout.
    """

    def __init__(
        self,
        model: QwenVLModel,
        tokens: SpecialTokens,
        decode: Callable[[Sequence[int]], str],
        *,
        max_batch_responses: int,
    ) -> None:
        """
        Args:
            model: this rank's share of the policy; `parallel.mesh` is initialized for its layout.
            decode: token ids to text, special tokens included; asked where stop texts are given.
        """
        self._model = model
        self._tokens = tokens
        self._decode = decode
        self._batch_responses = max_batch_responses
        self._version = 0

    @property
    def policy_version(self) -> int:
        return self._version

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Only notes the version: the weights are the trained model's own."""
        self._version = version

    def close(self) -> None:
        """Nothing to give back: memory lives for one call of `generate`."""

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, *, on_token: OnToken | None = None
    ) -> list[RolloutGroup]:
        """As `RolloutEngine.generate`.

        Args:
            on_token: told of every token as it comes, on every rank.

        Raises:
            ValueError: a prompt is empty, or its pads are not those of its images and videos; names the request.
        """
        end = EndOfResponse(self._tokens.end, params.stop, self._decode)
        rollouts: list[list[Rollout]] = [[] for _ in requests]
        cached_tokens: list[list[int]] = [[] for _ in requests]
        with generating(self._model):
            for parts in plan_waves(requests, self._batch_responses):
                wave = Wave(self._model, requests, parts, params, self._tokens.never_sampled)
                for part, answers in zip(parts, wave.run(end, on_token), strict=True):
                    rollouts[part.request] += (one.rollout(self._version) for one in answers)
                    cached_tokens[part.request] += self._cached_tokens(part, requests[part.request])
        return [
            RolloutGroup(request.id, tuple(answers), tuple(cached))
            for request, answers, cached in zip(requests, rollouts, cached_tokens, strict=True)
        ]

    @staticmethod
    def _cached_tokens(part: Part, request: GenerationRequest) -> list[int]:
        """The first response computes the prompt, the others find it."""
        return [0] + [len(request.prompt.token_ids)] * (len(part.responses) - 1)
