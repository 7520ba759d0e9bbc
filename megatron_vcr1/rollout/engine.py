"""What training, evaluation and `vcr1 generate` ask of an engine, whichever it is."""

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
    """How tokens are drawn.

    Attributes:
        max_new_tokens: a response that has so many is cut, and marked.
        temperature: 0 is greedy.
        top_p: the smallest set of tokens with at least this probability.
        top_k: the most probable tokens; 0: all.
        stop: texts that end a response, besides the model's end tokens.
        repetition_penalty: tokens of the prompt and of the response so far become less likely by it; 1: none. For
            answers to people, by the in-process engine; the log-probs of responses are without it, and training, whose
            own log-probs are too, never sets it.
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
        if 0 < self.temperature < 1e-6:  # logits that are divided by less may leave float32's range
            raise ValueError(f"temperature {self.temperature} is too small; 0 takes the most probable token")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0 and finite, got {self.repetition_penalty}")
        if "" in self.stop:
            raise ValueError("a stop text is empty, and every response would end at once; leave it out")


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt and how many responses it wants.

    Attributes:
        id: the sample's; unique within a call.
        seed: of the sampling of this group. The local engine's responses depend on it alone, not on what else is
            decoded at the time.
    """

    id: str
    prompt: EncodedPrompt
    num_responses: int
    seed: int = 0


class RolloutEngine(Protocol):
    """Samples responses. Image and video pads are never sampled.

    The ranks of one copy of the model call the methods together, with the same arguments, and get the same results.
    """

    @property
    def policy_version(self) -> int:
        """How many weight updates the policy has seen that `generate` samples from now."""
        ...

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[RolloutGroup]:
        """The groups of the requests, in their order.

        Raises:
            EngineError: the engine could not answer, after all that it can do about it.
        """
        ...

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over the policy's weights. All ranks of the job call it: copies of the model may share servers.

        Args:
            tensors: all weights, whole, under their Hugging Face names, each made when it is asked for (by a collective
                of all ranks of the copy). An engine that shares the trained model's memory does not ask.
            version: what `policy_version` is from now on.
        """
        ...

    def close(self) -> None:
        """Give back servers, processes and memory."""
        ...


class EngineError(RuntimeError):
    """An engine cannot go on; the message says what was tried and where its logs are."""


class WeightsNeeded(EngineError):
    """Nothing that samples has the policy's weights, though something could take them: `update_weights` helps."""
