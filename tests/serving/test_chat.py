from __future__ import annotations

import json
from typing import Any

import pytest

from megatron_vcr1.rollout.engine import SamplingParams
from megatron_vcr1.serving.chat import MAX_VISION_PARTS, RefusedRequest, parse_request

MESSAGES = [{"role": "user", "content": "when?"}]


def parse(**keys: Any) -> Any:
    return parse_request(json.dumps({"messages": MESSAGES, **keys}).encode())


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({}, SamplingParams(64, 1.0, repetition_penalty=1.05)),
        ({"repetition_penalty": None, "top_k": -1}, SamplingParams(64, 1.0, repetition_penalty=1.05)),
        ({"repetition_penalty": 1}, SamplingParams(64, 1.0)),
        ({"repetition_penalty": 1.2, "temperature": 0}, SamplingParams(64, 0.0, repetition_penalty=1.2)),
        (
            {"max_tokens": 9, "top_p": 0.5, "top_k": 3, "stop": "."},
            SamplingParams(9, 1.0, 0.5, 3, (".",), repetition_penalty=1.05),
        ),
    ],
)
def test_sampling_follows_the_request_and_the_models_defaults(keys: dict[str, Any], expected: SamplingParams) -> None:
    assert parse(**keys).sampling(64, 1.05) == expected


@pytest.mark.parametrize(
    "keys, message",
    [
        *(
            ({key: value}, f"^{key}[:.]")
            for key, value in {
                "guided_json": {"type": "object"},
                "guided_regex": "a*",
                "structured_outputs": {"json": {}},
                "bad_words": ["no"],
                "allowed_token_ids": [1],
                "no_repeat_ngram_size": 3,
                "length_penalty": 2.0,
                "use_beam_search": True,
                "best_of": 4,
                "continue_final_message": True,
                "add_generation_prompt": False,
                "chat_template": "{{ messages }}",
                "truncate_prompt_tokens": 10,
                "skip_special_tokens": False,
                "tool_choice": "required",
                "separate_reasoning": False,
                "return_token_ids": True,
                "made_up": 1,
                "stream_options": {"made_up": 1},
            }.items()
        ),
        ({"media_io_kwargs": {"image": {"mode": "L"}}}, r"^media_io_kwargs.image: unknown key"),
        ({"media_io_kwargs": {"video": {"backend": "x"}}}, r"^media_io_kwargs.video.backend: unknown key"),
        ({"stop": ["x" * 1001]}, "^stop"),
        ({"stop": ["x"] * 65}, "^stop"),
        ({"messages": [{"role": "tool", "content": "x"}]}, r"^messages\[0\].role: "),
        ({"messages": [{"role": "user", "content": "x", "cache": 1}]}, r"^messages\[0\].cache: unknown key"),
        ({"messages": [*MESSAGES, {"role": "user", "content": 1}]}, r"^messages\[1\].content: must be a text or a"),
        ({"messages": [*MESSAGES, {"role": "user", "content": ["x"]}]}, r"^messages\[1\].content\[0\]: must be an obj"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "weight": 2}]}]},
            r"^messages\[0\].content\[0\].weight: unknown key",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:", "detail": "low"}}]}
                ]
            },
            r"^messages\[0\].content\[0\].image_url.detail: ",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}] * 600}]},
            f"^messages: 600 images and videos; at most {MAX_VISION_PARTS}",
        ),
    ],
)
def test_unsupported_keys_are_refused_by_name(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedRequest, match=message):
        parse(**keys)


def test_messages_of_the_openai_client_are_accepted() -> None:
    empty = dict.fromkeys(("audio", "function_call", "refusal"))
    answer = {"role": "assistant", "content": "At 3 s.", "tool_calls": [], "annotations": [], **empty}
    named = {"role": "user", "content": [{"type": "text", "text": "when?"}], "name": "me"}
    request = parse(messages=[named, answer, named])
    assert [message.role for message in request.messages] == ["user", "assistant", "user"]
    assert request.num_characters() == 17


def test_defaults_that_sglangs_and_vllms_clients_send_change_nothing() -> None:
    sent = {"separate_reasoning": True, "stream_reasoning": True, "no_stop_trim": False, "include_reasoning": True}
    sent |= {"return_hidden_states": False, "return_token_ids": False, "return_meta_info": False}
    sent |= {"stream_options": {"include_usage": True, "continuous_usage_stats": False}, "use_audio_in_video": False}
    image = {"type": "image_url", "image_url": {"url": "data:"}, "modalities": "multi-images"}
    request = parse(messages=[{"role": "user", "content": [image]}], seed=0, **sent)
    assert request.sampling(64, 1.05) == parse().sampling(64, 1.05)
    assert request.parts()[0].options() == {}


def test_options_beside_the_url_of_a_video_are_followed() -> None:
    url = {"url": "data:", "detail": "auto", "fps": 4, "max_frames": 3}
    (part,) = parse(messages=[{"role": "user", "content": [{"type": "video_url", "video_url": url}]}]).parts()
    assert part.options() == {"fps": 4, "max_frames": 3, "min_frames": 3}
    both = {"type": "video_url", "video_url": url, "fps": 1, "max_frames": 8}
    (part,) = parse(messages=[{"role": "user", "content": [both]}]).parts()
    assert part.options() == {"fps": 1, "max_frames": 8, "min_frames": 4}
