"""A group's request and its answer: what SGLang's `/generate` takes, and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_vcr1.data.encoding import EncodedPrompt
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.mrope import prompt_positions, vision_token_mask
from megatron_vcr1.rollout.engine import GenerationRequest, SamplingParams
from megatron_vcr1.rollout.sglang.http import INITIAL_WEIGHTS
from megatron_vcr1.rollout.sglang.payload import PatchSettings, Payload, Picture
from megatron_vcr1.rollout.sglang.pool import OtherWeights, UnusableAnswer
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from megatron_vcr1.types import FinishReason, Rollout, RolloutGroup

# A ban lowers a token's logit by so much, after the division by the temperature: its probability falls by e^-40, which
# no run lives to see, and is still a float32, from which the answer's log-probs are corrected.
BAN = 40.0


class PromptEncoder:
    """Prompts of one model in the form that its servers take."""

    def __init__(self, config: ModelConfig) -> None:
        vision = config.vision
        self.config = config
        self.pad_ids = frozenset((config.image_token_id, config.video_token_id))
        self.patches = PatchSettings(
            vision.patch_size, vision.temporal_patch_size, vision.merge_size, vision.pixel_mean, vision.pixel_std
        )

    def payload(self, prompt: EncodedPrompt, salt: str) -> Payload | None:
        """The prompt's pictures and positions; None for text alone.

        Raises:
            ValueError: the pads are not those that the pictures fill.
        """
        if not prompt.vision:
            return None
        vision = self.config.vision
        positions = prompt_positions(
            prompt.token_ids,
            [(one.grid_thw, one.seconds_per_grid) for one in prompt.vision],
            vision_token_ids=self.pad_ids,
            merge_size=vision.merge_size,
            tokens_per_second=vision.tokens_per_second,
        )
        pads = iter(vision_token_mask(prompt.token_ids, self.pad_ids).nonzero()[:, 0].tolist())
        pictures = []
        for one in prompt.vision:
            rows = [next(pads) for _ in range(one.num_tokens(vision.merge_size))]
            pictures.append(Picture(one.frames.cpu(), one.seconds_per_grid is not None, rows[0]))  # from dali-gpu, too
        return Payload(tuple(pictures), positions, self.patches, salt)


def generate_body(
    request: GenerationRequest, params: SamplingParams, tokens: SpecialTokens, packed: str | None
) -> dict[str, Any]:
    """The JSON object of a group's request.

    Args:
        tokens: what ends a response, and what must not be sampled.
        packed: the prompt's payload, from `payload.pack`; None for text alone.
    """
    temperature = params.temperature or 1.0
    body: dict[str, Any] = {
        "input_ids": request.prompt.token_ids.tolist(),
        "sampling_params": {
            "n": request.num_responses,
            "max_new_tokens": params.max_new_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k or -1,
            "stop": list(params.stop) or None,
            "stop_token_ids": sorted(tokens.end),
            "logit_bias": {str(one): -BAN * temperature for one in tokens.never_sampled},
        },
        "return_logprob": True,
        "token_ids_logprob": list(tokens.never_sampled),
    }
    if packed is not None:
        body["video_data"] = [packed]
    return body


def read_group(request: GenerationRequest, answer: Any, policy_version: str, tokens: SpecialTokens) -> RolloutGroup:
    """The group that a server answered with.

    Args:
        policy_version: what the server must have called its weights, from the first token to the last.

    Raises:
        OtherWeights: part of it was sampled from other weights.
        UnusableAnswer: it was cut off by the server, or is malformed.
    """
    answers = answer if isinstance(answer, list) else [answer]
    if len(answers) != request.num_responses:
        raise UnusableAnswer(f"{len(answers)} responses instead of {request.num_responses}")
    try:
        metas = [one["meta_info"] for one in answers]
        rollouts = tuple(_read_rollout(meta, policy_version, tokens) for meta in metas)
        return RolloutGroup(request.id, rollouts, tuple(int(meta["cached_tokens"]) for meta in metas))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UnusableAnswer(f"not the answer that was expected ({error!r})") from error


def _read_rollout(meta: Mapping[str, Any], policy_version: str, tokens: SpecialTokens) -> Rollout:
    spans = [one["version"] for one in meta.get("weight_versions") or ()]
    versions = {str(one) for one in (*spans, meta["weight_version"])}
    if versions != {policy_version}:
        raise OtherWeights(f"sampled from weights {sorted(versions)} instead of {policy_version}")
    reason = meta["finish_reason"]
    if reason["type"] not in ("stop", "length"):
        raise UnusableAnswer(f"cut off: {reason.get('message') or reason['type']}")
    sampled = meta["output_token_logprobs"]
    token_ids = tuple(int(one[1]) for one in sampled)
    if not set(tokens.never_sampled).isdisjoint(token_ids):
        raise UnusableAnswer("a banned token was sampled")
    log_probs = [
        _without_ban(float(one[0]), [float(other[0]) for other in banned])
        for one, banned in zip(sampled, meta["output_token_ids_logprobs"], strict=True)
    ]
    finish = FinishReason.LENGTH if reason["type"] == "length" else FinishReason.STOP
    return Rollout(token_ids, tuple(log_probs), finish, version_number(policy_version))


def _without_ban(log_prob: float, banned: Sequence[float]) -> float:
    """A token's log-prob over the whole vocabulary, from what the server computed with the banned tokens held down."""
    gained = sum(math.exp(one + BAN) - math.exp(one) for one in banned)
    return log_prob - math.log1p(gained)


def version_name(version: int, run: str) -> str:
    """What a server's weights are called after a sync: version 3 of one run is not version 3 of another."""
    return f"{version}@{run}"


def version_number(name: str) -> int:
    """The inverse; what a server was started with is version 0."""
    return 0 if name == INITIAL_WEIGHTS else int(name.partition("@")[0])
