"""Generates one response to one prompt, and prints it to the terminal token by token."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers import TextStreamer

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.layout import check_layout
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.encoding import EncodedPrompt, encode_messages
from megatron_vcr1.data.messages import MessageError
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.video_types import VideoError
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.prompts import broadcast_prompts
from megatron_vcr1.rollout.engine import GenerationRequest, SamplingParams
from megatron_vcr1.rollout.local.engine import LocalEngine
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from megatron_vcr1.types import Rollout


class _Stopwatch:
    """Durations of phases, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End the phase `name`, which began with the previous lap."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def generate_response(
    run: RunConfig, message: Mapping[str, Any], params: SamplingParams, *, seed: int, as_json: bool
) -> None:
    """Respond to a message. All ranks of the job call this, and the first rank prints.

    Args:
        run: the model and its layout.
        message: the user's message in the format of `encode_messages`.
        params: sampling parameters.
        seed: seed of the sampling.
        as_json: print one JSON object at the end, instead of the text as it is generated and a line of timings.

    Raises:
        UserError: the model or the layout is invalid, or a video or image cannot be read.
    """
    config = ModelConfig.from_pretrained(run.model.path)
    check_layout(config.shape, run.parallel, run.recompute, mesh.launched_world_size())
    processor = PromptProcessor.from_pretrained(run.model.path, config)
    tokens = SpecialTokens.from_pretrained(run.model.path, processor, config.num_embeddings)
    stopwatch = _Stopwatch()

    def requests() -> list[GenerationRequest]:
        try:
            return [GenerationRequest("prompt", encode_messages([message], processor), num_responses=1, seed=seed)]
        except (MessageError, VideoError) as error:
            raise UserError(str(error)) from error

    with mesh.world(run.parallel):
        (request,) = broadcast_prompts(requests)  # replica leaders decode, the other ranks receive
        stopwatch.lap("prompt")
        model = build_model(config, run.model, run.parallel, run.recompute).to(mesh.device())
        load_model_weights(model, run.model.path)
        stopwatch.lap("load")
        decode = partial(processor.decode, skip_special_tokens=False)
        engine = LocalEngine(model, tokens, decode, max_batch_responses=1)
        streamer = TextStreamer(processor.tokenizer, skip_special_tokens=True)
        is_first = mesh.is_first_rank()

        def on_token(request: int, response: int, token_id: int) -> None:
            if "first_token" not in stopwatch.seconds:
                stopwatch.lap("first_token")
            if is_first and not as_json:
                streamer.put(torch.tensor([token_id]))

        (group,) = engine.generate([request], params, on_token=on_token)
        stopwatch.lap("further_tokens")
        if is_first and as_json:
            row = _as_row(group.rollouts[0], request.prompt, processor, stopwatch.seconds)
            print(json.dumps({"prompt": _text(message), **row}))
        elif is_first:
            streamer.end()
            print(_summary(group.rollouts[0], request.prompt, stopwatch.seconds), file=sys.stderr)


def _text(message: Mapping[str, Any]) -> str:
    """Return the text of a message."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def _as_row(
    rollout: Rollout, prompt: EncodedPrompt, processor: PromptProcessor, seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Return the object that --json prints."""
    return {
        "text": processor.decode(rollout.token_ids),
        "token_ids": rollout.token_ids,
        "log_probs": rollout.log_probs,
        "finish_reason": rollout.finish_reason,
        "prompt_tokens": len(prompt.token_ids),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
    }


def _summary(rollout: Rollout, prompt: EncodedPrompt, seconds: Mapping[str, float]) -> str:
    """Return the line of timings."""
    num_frames = sum(len(vision.frames) for vision in prompt.vision)
    num_further = len(rollout.token_ids) - 1
    rate = f" ({num_further / seconds['further_tokens']:.1f} tokens/s)" if num_further else ""
    return (
        f"\nprompt: {len(prompt.token_ids)} tokens, {num_frames} frames, {seconds['prompt']:.2f} s to decode; "
        f"model loaded in {seconds['load']:.2f} s; first token after {seconds['first_token']:.2f} s, "
        f"{num_further} more in {seconds['further_tokens']:.2f} s{rate}; ended by {rollout.finish_reason}"
    )
