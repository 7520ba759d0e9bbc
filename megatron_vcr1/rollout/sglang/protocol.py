"""The JSON of a group's request to SGLang's `/generate`, and of the response to it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_vcr1.data.encoding import EncodedPrompt, VisionInput
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.mrope import prompt_positions, vision_token_mask
from megatron_vcr1.rollout.engine import EngineError, GenerationRequest, SamplingParams
from megatron_vcr1.rollout.sglang.http import INITIAL_WEIGHTS
from megatron_vcr1.rollout.sglang.payload import MediaItem, PatchSettings, Payload
from megatron_vcr1.rollout.sglang.pool import UnusableResponse, WrongWeights
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from megatron_vcr1.text_files import require_object
from megatron_vcr1.types import FinishReason, Rollout, RolloutGroup

BAN = 40.0
"""The value by which a ban lowers a token's logit, after the division by the temperature.

It lowers the token's probability by a factor of e^-40, so a run will never sample it. The lowered probability is still
a normal float32, so the log-probs of the response can be corrected for the ban. With an infinite ban it would be lost.
"""


class PromptEncoder:
    """Converts the images, videos and positions of prompts to payloads for servers."""

    def __init__(self, config: ModelConfig) -> None:
        vision = config.vision
        self.config = config
        self.patches = PatchSettings(
            vision.patch_size, vision.temporal_patch_size, vision.merge_size, vision.pixel_mean, vision.pixel_std
        )

    def payload(self, prompt: EncodedPrompt, salt: str) -> Payload | None:
        """Collect the images, videos and positions of a prompt; None for a prompt of text alone.

        Args:
            prompt: the prompt, with its frames on any device.
            salt: name of the weights, for the servers' cache of vision features.

        Raises:
            ValueError: the pads of the prompt do not match its images and videos.
        """
        if not prompt.vision:
            return None
        positions = prompt_positions(self.config, prompt)
        pads = iter(vision_token_mask(prompt.token_ids, self.config.pad_ids).nonzero()[:, 0].tolist())
        media: list[MediaItem] = []
        for item in prompt.vision:
            tokens = [next(pads) for _ in range(item.num_tokens(self.config.vision.merge_size))]
            media += self._media_items(item, tokens)
        return Payload(tuple(media), positions, self.patches, salt)

    def _media_items(self, item: VisionInput, tokens: Sequence[int]) -> Iterator[MediaItem]:
        """Split an image or video into an item for each of its runs of pads.

        Attention of the vision tower stays within a temporal patch, so its patches can be computed apart. A video whose
        temporal patches have runs of their own becomes as many items: SGLang batches items of a single run, and
        computes only those that a chunk of its prefill needs.
        """
        starts = [token for token, before in zip(tokens, [-2, *tokens], strict=False) if token != before + 1]
        all_frames = item.frames.cpu()  # frames that were decoded on a GPU (dali-gpu) are copied to the host
        pieces = [all_frames] if len(starts) == 1 else all_frames.split(self.patches.temporal_patch_size)
        for start, frames in zip(starts, pieces, strict=True):
            yield MediaItem(frames, item.seconds_per_grid is not None, start)


def generate_body(
    request: GenerationRequest, params: SamplingParams, tokens: SpecialTokens, packed: str | None
) -> dict[str, Any]:
    """Build the JSON object of a group's request.

    Args:
        request: the prompt and the number of responses.
        params: sampling parameters.
        tokens: end tokens, and tokens that must not be sampled. The latter are banned with a logit bias.
        packed: the prompt's payload, from `payload.pack`; None for a prompt of text alone.
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
            # SGLang adds the bias before it divides by the temperature.
            "logit_bias": {str(token_id): -BAN * temperature for token_id in tokens.never_sampled},
        },
        "return_logprob": True,
        "token_ids_logprob": list(tokens.never_sampled),  # to correct the log-probs for the ban
    }
    if packed is not None:
        body["video_data"] = [packed]
    return body


def read_group(
    request: GenerationRequest, response: Any, params: SamplingParams, weight_version: str, tokens: SpecialTokens
) -> RolloutGroup:
    """Read the group from a server's response.

    Args:
        request: the request that was sent.
        response: the parsed JSON of the response.
        params: the sampling parameters that were sent.
        weight_version: the version that the server must have had from the first token to the last.
        tokens: the tokens that were banned.

    Raises:
        WrongWeights: a part of the group was sampled from other weights.
        UnusableResponse: the server cut a response off, or the JSON is not as expected.
        EngineError: the server has no room for prompts and responses of this length.
    """
    choices = response if isinstance(response, list) else [response]
    if len(choices) != request.num_responses:
        raise UnusableResponse(f"{len(choices)} responses instead of {request.num_responses}")
    try:
        metas = [require_object(require_object(choice, "response")["meta_info"], "meta_info") for choice in choices]
        rollouts = tuple(_read_rollout(meta, weight_version, tokens) for meta in metas)
        group = RolloutGroup(request.id, rollouts, tuple(int(meta["cached_tokens"]) for meta in metas))
    # What reading a server's JSON raises if it has another form.
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise UnusableResponse(f"the response is not in the expected format ({repr(error)[:500]})") from error
    shortest = min(
        (len(rollout.token_ids) for rollout in rollouts if rollout.finish_reason == FinishReason.LENGTH),
        default=params.max_new_tokens,
    )
    # SGLang lowers max_new_tokens without a word to what its context length or its KV cache leaves for a response.
    if shortest < params.max_new_tokens:
        raise EngineError(
            f"sample {request.id}: the server has room for {shortest} tokens after a prompt of "
            f"{len(request.prompt.token_ids)}, not for rollout.max_new_tokens = {params.max_new_tokens}: its KV cache "
            "or its context length is too small; raise sglang.memory_fraction, or lower data.max_prompt_tokens"
        )
    return group


def _read_rollout(meta: Mapping[str, Any], weight_version: str, tokens: SpecialTokens) -> Rollout:
    # `weight_versions` lists the versions of spans of tokens, if the weights changed while the response was sampled.
    spans = [span["version"] for span in meta.get("weight_versions") or ()]
    versions = {str(version) for version in (*spans, meta["weight_version"])}
    if versions != {weight_version}:
        raise WrongWeights(f"sampled from weights {sorted(versions)} instead of {weight_version}")
    reason = require_object(meta["finish_reason"], "finish_reason")
    if reason["type"] not in ("stop", "length"):
        raise UnusableResponse(f"cut off: {reason.get('message') or reason['type']}")
    sampled = meta["output_token_logprobs"]  # (log-prob, token id, text) of each token
    token_ids = tuple(int(token[1]) for token in sampled)
    if not set(tokens.never_sampled).isdisjoint(token_ids):
        raise UnusableResponse("a banned token was sampled")
    log_probs = [
        _correct_for_ban(float(token[0]), [float(banned[0]) for banned in banned_tokens])
        for token, banned_tokens in zip(sampled, meta["output_token_ids_logprobs"], strict=True)
    ]
    if not all(map(math.isfinite, log_probs)):
        raise UnusableResponse("a log-prob is not a finite number")
    finish = FinishReason.LENGTH if reason["type"] == "length" else FinishReason.STOP
    return Rollout(token_ids, tuple(log_probs), finish, version_number(weight_version))


def _correct_for_ban(log_prob: float, banned: Sequence[float]) -> float:
    """Convert a log-prob to one over the whole vocabulary without the ban.

    Without the ban, the partition sum Z would be larger: a banned token with log-prob b has probability e^b instead of
    e^(b + BAN), in units of the server's Z. So Z grows by the factor 1 + sum(e^(b + BAN) - e^b).

    Args:
        log_prob: the server's log-prob of the sampled token.
        banned: the server's log-probs of the banned tokens.
    """
    growth = sum(math.exp(value + BAN) - math.exp(value) for value in banned)
    return log_prob - math.log1p(growth)


def version_name(version: int, update_id: str) -> str:
    """Name the weights of a policy version. The id keeps version 3 of one run apart from version 3 of another."""
    return f"{version}@{update_id}"


def version_number(name: str) -> int:
    """Return the policy version of named weights; the weights that a server was started with are version 0."""
    return 0 if name == INITIAL_WEIGHTS else int(name.partition("@")[0])
