"""Tests of requests and responses: sampling parameters, payloads, weight versions, and log-probs without the ban."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.rollout.engine import EngineError, GenerationRequest, SamplingParams
from megatron_vcr1.rollout.sglang.pool import UnusableResponse, WrongWeights
from megatron_vcr1.rollout.sglang.protocol import BAN, PromptEncoder, generate_body, read_group
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from megatron_vcr1.types import FinishReason
from tests.model import tiny

TOKENS = SpecialTokens(frozenset([1]), (5, 6))


def request(num_responses: int = 1, kinds: str = "") -> GenerationRequest:
    return GenerationRequest("s", tiny.prompt(kinds, seed=0), num_responses)


def meta(**changes: Any) -> dict[str, Any]:
    """Return the metadata of a response of two tokens on which the ban has no effect."""
    low = -1e38
    return {
        "finish_reason": {"type": "stop", "matched": 1},
        "weight_version": "3@run",
        "weight_versions": [{"version": "3@run", "start": 0, "end": 2}],
        "output_token_logprobs": [[-1.0, 9, None], [-2.0, 1, None]],
        "output_token_ids_logprobs": [[[low, 5, None], [low, 6, None]]] * 2,
        "cached_tokens": 2,
    } | changes


def read(*metas: dict[str, Any], num_responses: int | None = None) -> Any:
    sent = request(len(metas) if num_responses is None else num_responses)
    return read_group(sent, [{"meta_info": meta} for meta in metas], SamplingParams(2), "3@run", TOKENS)


def test_a_request_contains_all_sampling_parameters() -> None:
    params = SamplingParams(7, temperature=0.5, top_p=0.9, top_k=40, stop=("</answer>",))
    body = generate_body(request(8), params, TOKENS, None)
    assert body["sampling_params"] == {
        "n": 8,
        "max_new_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "stop": ["</answer>"],
        "stop_token_ids": [1],
        "logit_bias": {"5": -BAN / 2, "6": -BAN / 2},
    }
    assert body["return_logprob"] and body["token_ids_logprob"] == [5, 6]
    assert "video_data" not in body
    everything = generate_body(request(), SamplingParams(7), TOKENS, "packed")
    assert everything["video_data"] == ["packed"]
    assert everything["sampling_params"]["top_k"] == -1 and everything["sampling_params"]["stop"] is None


def test_a_video_with_time_stamps_becomes_an_item_for_each_temporal_patch() -> None:
    config = ModelConfig.from_dict(tiny.hf_config("qwen3_vl").to_dict())
    prompt = tiny.prompt("vi", seed=1, timestamps=True)
    payload = PromptEncoder(config).payload(prompt, "salt")
    assert payload is not None
    video, image = prompt.vision
    assert [media.is_video for media in payload.media] == [True] * 3 + [False]
    assert torch.equal(torch.cat([media.frames for media in payload.media[:3]]), video.frames)
    assert payload.media[3].frames is image.frames
    pads = [
        index
        for media in payload.media
        for index in range(media.first_token, media.first_token + payload.num_tokens(media))
    ]
    is_pad = torch.isin(prompt.token_ids, torch.tensor([tiny.VIDEO_PAD, tiny.IMAGE_PAD]))
    assert pads == is_pad.nonzero()[:, 0].tolist()
    assert len({payload.identity(media) for media in payload.media}) == 4


@pytest.mark.parametrize("kinds", ["i", "v", "ivv"])
def test_images_and_videos_keep_their_positions_and_order(kinds: str) -> None:
    config = ModelConfig.from_dict(tiny.hf_config("qwen2_5_vl").to_dict())
    prompt = tiny.prompt(kinds, seed=1)
    payload = PromptEncoder(config).payload(prompt, "salt")
    assert payload is not None
    for media, item, kind in zip(payload.media, prompt.vision, kinds, strict=True):
        assert media.is_video == (kind == "v") and media.frames is item.frames
        num_tokens = item.num_tokens(2)
        assert payload.num_tokens(media) == num_tokens
        pads = prompt.token_ids[media.first_token - 1 : media.first_token + num_tokens + 1].tolist()
        pad = tiny.VIDEO_PAD if kind == "v" else tiny.IMAGE_PAD
        assert pads == [tiny.VISION_START, *[pad] * num_tokens, tiny.VISION_END]


def test_a_prompt_of_text_alone_has_no_payload() -> None:
    config = ModelConfig.from_dict(tiny.hf_config("qwen2_5_vl").to_dict())
    assert PromptEncoder(config).payload(tiny.prompt("", seed=1), "salt") is None


def test_a_group_is_read() -> None:
    cut = meta(finish_reason={"type": "length", "length": 2}, cached_tokens=0)
    group = read(meta(), cut)
    assert group.cached_tokens == (2, 0)
    assert [rollout.finish_reason for rollout in group.rollouts] == [FinishReason.STOP, FinishReason.LENGTH]
    assert group.rollouts[0].token_ids == (9, 1)
    assert group.rollouts[0].log_probs == (-1.0, -2.0)
    assert {rollout.policy_version for rollout in group.rollouts} == {3}


def test_log_probs_are_corrected_for_the_ban() -> None:
    """Compares with a float64 softmax over the whole vocabulary."""
    logits = torch.randn(10, generator=torch.Generator().manual_seed(0)).double() * 3
    banned = logits.clone()
    banned[[5, 6]] -= BAN
    expected, found = logits.log_softmax(0), banned.log_softmax(0)
    token = [[float(found[9]), 9, None]]
    answer = meta(
        output_token_logprobs=token,
        output_token_ids_logprobs=[[[float(found[5]), 5, None], [float(found[6]), 6, None]]],
    )
    assert abs(float(found[9] - expected[9])) > 1e-3
    assert math.isclose(read(answer).rollouts[0].log_probs[0], float(expected[9]), abs_tol=1e-9)


def test_a_response_of_two_versions_is_rejected() -> None:
    spans = [{"version": "2@run", "start": 0, "end": 1}, {"version": "3@run", "start": 1, "end": 2}]
    with pytest.raises(WrongWeights, match="2@run"):
        read(meta(weight_versions=spans))
    with pytest.raises(WrongWeights, match="3@other"):
        read(meta(weight_version="3@other", weight_versions=[]))


@pytest.mark.parametrize(
    "answer, message",
    [
        (meta(finish_reason={"type": "abort", "message": "out of memory"}), "cut off: out of memory"),
        (meta(output_token_logprobs=[[-1.0, 5, None], [-2.0, 1, None]]), "a banned token was sampled"),
        (meta(output_token_logprobs=None), "not in the expected format"),
        (meta(output_token_logprobs=[], output_token_ids_logprobs=[]), "not in the expected format"),
        ({}, "not in the expected format"),
        ({"meta_info": ["finish_reason"]}, "not in the expected format"),
        ("meta_info", "not in the expected format"),
        (meta(finish_reason="stop"), "not in the expected format"),
        (meta(output_token_logprobs=[[-1.0, float("inf"), None], [-2.0, 1, None]]), "not in the expected format"),
        (meta(output_token_ids_logprobs=[[[1e9, 5, None]], [[1e9, 5, None]]]), "not in the expected format"),
        (meta(output_token_logprobs=[[float("nan"), 9, None], [-2.0, 1, None]]), "not a finite number"),
    ],
)
def test_a_malformed_response_is_unusable(answer: Any, message: str) -> None:
    with pytest.raises(UnusableResponse, match=message):
        read(answer)


def test_a_response_that_a_small_kv_cache_has_shortened_is_an_error() -> None:
    short = meta(finish_reason={"type": "length", "length": 2})
    with pytest.raises(EngineError, match=r"sample s: .* room for 2 tokens after .* = 3: .*raise sglang"):
        read_group(request(2), [{"meta_info": meta()}, {"meta_info": short}], SamplingParams(3), "3@run", TOKENS)


def test_a_missing_response_is_detected() -> None:
    with pytest.raises(UnusableResponse, match="1 responses instead of 2"):
        read(meta(), num_responses=2)
