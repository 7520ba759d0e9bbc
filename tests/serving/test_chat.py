"""What a request says of sampling."""

from __future__ import annotations

import json

import pytest

from megatron_vcr1.rollout.engine import SamplingParams
from megatron_vcr1.serving.chat import parse_request


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
def test_a_request_is_drawn_as_it_asks_and_else_as_the_model_does(
    keys: dict[str, object], expected: SamplingParams
) -> None:
    body = {"messages": [{"role": "user", "content": "when?"}], **keys}
    assert parse_request(json.dumps(body).encode()).sampling(64, 1.05) == expected
