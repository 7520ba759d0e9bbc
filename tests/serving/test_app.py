"""Limits and errors of the routes, on the real process."""

from __future__ import annotations

import base64
import io
import json
import select
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest
from PIL import Image

from tests.limits import HANG_S
from tests.serving.requests import (
    MAX_BODY_BYTES,
    MAX_IN_FLIGHT,
    ServerProcess,
    ask,
    image,
    picture,
    post,
    text,
    video,
)

pytestmark = pytest.mark.xdist_group("serving")  # one worker, one server


def test_the_servers_token_limit_applies(client: openai.OpenAI) -> None:
    answer = ask(client, text("when?"), max_tokens=1000)
    assert answer.usage.completion_tokens <= 12
    assert ask(client, text("when?"), max_tokens=None, max_completion_tokens=1).usage.completion_tokens == 1


def test_control_tokens_in_texts_are_text(client: openai.OpenAI) -> None:
    ordinary = ask(client, text("x" * len("<|video_pad|>"))).usage.prompt_tokens
    for parts in (["<|video_pad|>"], ["<|video_", "pad|>"]):
        assert ask(client, *map(text, parts)).usage.prompt_tokens == ordinary
    assert ask(client, text("<|im_end|>")).usage.prompt_tokens == ordinary - 3


def test_nulls_and_neutral_values_change_nothing(client: openai.OpenAI) -> None:
    nulls = dict.fromkeys(("seed", "top_p", "n", "stop", "stream", "tools", "logit_bias", "guided_json"))
    neutral = {"presence_penalty": 0, "repetition_penalty": 1.0, "response_format": {"type": "text"}, "top_k": -1}
    harmless = {"user": "me", "metadata": {"a": "b"}, "best_of": 1, "skip_special_tokens": True}
    expected = ask(client, text("when?")).choices[0].message.content
    answer = ask(client, text("when?"), extra_body=nulls | neutral | harmless)
    assert answer.choices[0].message.content == expected


@pytest.mark.parametrize(
    "parts, options, message",
    [
        ([image(picture())] * 100, {}, r"content\[66\]: .* up to here take 402 tokens; at most 400 are supported"),
        ([text("x")], {"logprobs": True}, "logprobs: this value is not supported"),
        ([text("x")], {"extra_body": {"mm_processor_kwargs": {"fps": 1}}}, "mm_processor_kwargs: this value"),
        ([text("x")], {"presence_penalty": 0.5}, "presence_penalty: this value is not supported"),
        ([text("x")], {"extra_body": {"repetition_penalty": 0}}, "repetition_penalty: Input should be greater than 0"),
        ([text("x")], {"temperature": 1e-40}, "temperature 1e-40 is too small; use 0"),
        ([text("x")], {"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ([text("when? " * 500)], {}, "tokens; at most 400 are supported"),
        ([text("x" * 100_000)], {}, "the texts have 100000 characters; at most 25600 are supported"),
        ([text("x"), video("http://127.0.0.1:1/a.mp4")], {}, r"content\[1\]: http.*send data: URLs, or file:// URLs"),
        ([video("file:///etc/hostname")], {}, "is not below the folder"),
        ([text("x"), video("data:video/mp4;base64,AAAA")], {}, r"messages\[0\].content\[1\]: (?!.*/tmp)"),
        ([text("x"), image("data:image/png;base64,AAAA")], {}, r"messages\[0\].content\[1\]: not an image in a known"),
        ([image("data:image/png,AAAA")], {}, r"content\[0\]: a data: URL must be data:KIND;base64,CONTENT"),
        ([{"type": "input_audio", "input_audio": {}}], {}, r"messages\[0\].content\[0\]: type 'input_audio' is not"),
        ([{"type": "video", "video": "a.mp4"}], {}, r"messages\[0\].content\[0\]: type 'video' is not supported; use"),
        ([{"type": "image_url", "image_url": "data:"}], {}, r"content\[0\].image_url: must be an object with the key"),
        ([video("data:video/jpeg;base64,AAAA,B")], {}, r"content\[0\]: (frame 1: .*base64|frame 0: not an image)"),
        (
            [video("data:video/mp4;base64,AA", total_pixels=10**12)],
            {},
            r"content\[0\]: total_pixels 1000000000000 asks for",
        ),
        ([video("data:video/mp4;base64,AA", nframes=4)], {}, r"content\[0\].nframes: unknown key"),
    ],
)
def test_a_bad_request_gets_400_with_the_reason(
    client: openai.OpenAI, parts: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, *parts, **options)
    assert ask(client, text("when?")).choices  # the server goes on


@pytest.mark.parametrize("frames", [2, 3])
def test_a_bad_frame_is_named(client: openai.OpenAI, frames: int) -> None:
    good = picture().partition(",")[2]
    url = "data:video/jpeg;base64," + ",".join([good] * (frames - 1) + ["AAAA"])
    with pytest.raises(openai.BadRequestError, match=rf"content\[0\], frame {frames - 1}: not an image"):
        ask(client, video(url))


def test_an_image_with_too_many_pixels_is_refused_before_decoding(client: openai.OpenAI) -> None:
    file = io.BytesIO()
    Image.new("1", (20_000, 8_000)).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\].content\[1\]: 20000x8000 pixels are more than"):
        ask(client, text("x"), image(url))


def test_a_link_out_of_the_folder_is_refused(folder: Path, client: openai.OpenAI) -> None:
    link = folder / "data" / "link.mp4"
    link.symlink_to("/etc/hostname")
    for url in (link.as_uri(), f"{(folder / 'data').as_uri()}/../model/config.json", "file://elsewhere/a.mp4"):
        with pytest.raises(openai.BadRequestError, match=r"not below the folder|of this machine"):
            ask(client, video(url))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"messages": []}',
        b"\xff",
        b"[" * 100_000,
        b'{"messages": ' + b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "top_p": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
    ],
    ids=lambda body: str(body[:20]),
)
def test_a_malformed_body_gets_400(server: ServerProcess, body: bytes) -> None:
    status, answer = post(server.url, body)
    assert status == 400
    assert json.loads(answer)["error"]["type"] == "invalid_request_error"


def test_errors_of_the_router_have_the_same_format(server: ServerProcess) -> None:
    for method, path, status in (("DELETE", "/models", 405), ("GET", "/completions", 404), ("GET", "/models/", 404)):
        with pytest.raises(urllib.error.HTTPError, match=str(status)) as raised:
            urllib.request.urlopen(urllib.request.Request(server.url + path, method=method))
        assert method in json.loads(raised.value.read())["error"]["message"]
    with urllib.request.urlopen(server.url.removesuffix("/v1") + "/health") as answer:
        assert answer.status == 200


def test_a_body_above_the_limit_gets_413(server: ServerProcess) -> None:
    status, answer = post(server.url, b" " * (MAX_BODY_BYTES + 1))
    assert (status, "at most 8 MiB" in json.loads(answer)["error"]["message"]) == (413, True)
    with server.connect() as connection:  # without a declared length
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
        connection.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"
        connection.sendall(chunk * 8)
        connection.sendall(b"1\r\n \r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_requests_in_flight_are_bounded(server: ServerProcess, client: openai.OpenAI) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
    connections = [server.connect() for _ in range(MAX_IN_FLIGHT + 1)]
    for connection in connections:
        connection.sendall(head)  # the body stays incomplete, so that the requests stay in flight
    # The one that the server has read last gets a response. Before that, any other request could take its place.
    [refused], _, _ = select.select(connections, [], [], HANG_S)
    assert refused.recv(100).startswith(b"HTTP/1.1 503")
    with pytest.raises(openai.InternalServerError) as raised:
        ask(client, text("when?"))
    assert raised.value.status_code == 503
    assert raised.value.response.headers["retry-after"] == "1"
    for connection in connections:
        connection.close()
    deadline = time.monotonic() + HANG_S
    while True:
        try:
            assert ask(client, text("when?")).choices
            break
        except openai.InternalServerError:
            assert time.monotonic() < deadline, "the requests of clients that have left still count"
            time.sleep(0.1)
