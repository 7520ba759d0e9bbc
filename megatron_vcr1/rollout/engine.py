"""The interface of rollout engines, which training, evaluation and `vcr1 generate` use."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_vcr1.data.encoding import EncodedPrompt
from megatron_vcr1.types import RolloutGroup


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling parameters, shared by all requests of a call.

    Attributes:
        max_new_tokens: maximum length of a response; a response that reaches it is truncated and marked.
        temperature: sampling temperature; 0 means greedy decoding.
        top_p: sample from the smallest set of tokens with at least this total probability.
        top_k: sample from the k most probable tokens; 0 means all tokens.
        stop: strings that end a response, in addition to the model's end tokens.
        repetition_penalty: makes the tokens of the prompt and of the response so far less likely; 1 means no penalty.
            Only the in-process engine applies it, when it answers users. The log-probs of the responses are computed
            without the penalty. Training never sets it, because it recomputes log-probs without a penalty.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ValueError(
                "need a finite temperature >= 0, 0 < top_p <= 1, top_k >= 0; "
                f"got {self.temperature}, {self.top_p}, {self.top_k}"
            )
        # Logits are divided by the temperature. A smaller divisor could overflow float32.
        if 0 < self.temperature < 1e-6:
            raise ValueError(f"temperature {self.temperature} is too small; use 0 for greedy decoding")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0 and finite, got {self.repetition_penalty}")
        if "" in self.stop:
            raise ValueError("a stop string is empty, so every response would end at once; remove it")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt and the number of responses to sample for it.

    Attributes:
        id: id of the sample; unique within a call.
        prompt: token ids, images and videos.
        num_responses: number of responses (the group size).
        seed: random seed of this group. In the in-process engine, the responses depend only on the request and its
            seed, not on the other requests that are decoded at the same time. SGLang servers ignore it.
    """

    id: str
    prompt: EncodedPrompt
    num_responses: int
    seed: int = 0


class RolloutEngine(Protocol):
    """An engine that samples responses from the policy. It never samples image and video pads.

    All ranks of a replica call the methods together, with the same arguments, and get the same results: every method
    may run collectives.
    """

    @property
    def policy_version(self) -> int:
        """Version of the weights that `generate` samples from, as the last `update_weights` gave it; 0 before."""
        ...

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[RolloutGroup]:
        """Sample the responses of all requests and return one group per request, in order.

        Raises:
            EngineError: the engine could not produce all responses, in spite of its retries.
        """
        ...

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send the policy's weights to the engine. All ranks of the job must call it: replicas may share servers.

        Args:
            tensors: all weights, unsharded, under their Hugging Face names. Each tensor is gathered when the iterator
                reaches it, by a collective of all ranks of the replica, so all of them must iterate to the end. An
                engine that shares the memory of the trained model does not iterate.
            version: the value of `policy_version` from now on.
        """
        ...

    def close(self) -> None:
        """Release servers, processes and memory."""
        ...


class EngineError(RuntimeError):
    """An engine cannot continue. The message says what was tried and where the logs are."""


class WeightsNeeded(EngineError):
    """Servers are running, but none of them has the policy's weights: call `update_weights`."""
