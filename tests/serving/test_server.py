"""The server as its clients know it: `vcr1 serve` in a process of its own, called through the `openai` package."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import openai
import pytest

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.encoding import encode_messages
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.build import build_engine
from megatron_vcr1.rollout.engine import GenerationRequest, SamplingParams
from megatron_vcr1.rollout.local.engine import LocalEngine
from megatron_vcr1.rollout.local.wave import OnToken
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from megatron_vcr1.serving import connections
from megatron_vcr1.serving.app import Limits
from megatron_vcr1.serving.server import ChatServer
from megatron_vcr1.types import FinishReason, Rollout, RolloutGroup
from tests.limits import HANG_S
from tests.serving.requests import ask, first_video, image, picture, picture_file, text, video

pytestmark = pytest.mark.xdist_group("serving")  # one worker, one server

QUESTIONS = ["when?", "where?", "which and when?", "how good?"]


def test_responses_equal_the_engines(folder: Path, client: openai.OpenAI, tmp_path: Path) -> None:
    config = RunConfig.model_validate({"model": {"path": folder / "model", "dtype": "float32"}})
    processor = PromptProcessor.from_pretrained(folder / "model", ModelConfig.from_pretrained(folder / "model"))
    picture_path = tmp_path / "picture.png"
    picture_path.write_bytes(picture_file())
    frames = []
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(picture_file(number, "JPEG"))
        frames.append(str(tmp_path / f"{number}.jpg"))
    frames_url = "data:video/jpeg;base64," + ",".join(
        base64.b64encode(Path(frame).read_bytes()).decode() for frame in frames
    )
    clip = first_video(folder)
    pairs = [
        ([text("when?")], [text("when?")]),
        ([image(picture()), text("where?")], [{"type": "image", "image": str(picture_path)}, text("where?")]),
        (
            [image(picture(), max_pixels=28 * 28 * 2), text("where?")],
            [{"type": "image", "image": str(picture_path), "max_pixels": 28 * 28 * 2, "min_pixels": 28 * 28}],
        ),
        ([video(clip.as_uri()), text("which?")], [{"type": "video", "video": str(clip), "max_frames": 4}]),
        (
            [video("data:video/mp4;base64," + base64.b64encode(clip.read_bytes()).decode()), text("which?")],
            [{"type": "video", "video": str(clip), "max_frames": 4}],
        ),
        (
            [video(clip.as_uri(), fps=1, max_frames=2, total_pixels=4 * 28 * 28, min_pixels=28 * 28), text("which?")],
            [
                {
                    "type": "video",
                    "video": str(clip),
                    "fps": 1,
                    "min_frames": 2,
                    "max_frames": 2,
                    "total_pixels": 4 * 28 * 28,
                    "min_pixels": 28 * 28,
                }
            ],
        ),
        (
            [video(frames_url, fps=4, max_frames=6), text("which?")],
            [{"type": "video", "video": frames, "image_fps": 4, "max_frames": 6}],
        ),
    ]
    pairs[2][0][0]["min_pixels"] = 28 * 28
    reading = {"media_io_kwargs": {"video": {"num_frames": 4}}}
    with mesh.world(config.parallel):
        model = build_model(
            ModelConfig.from_pretrained(folder / "model"), config.model, config.parallel, config.recompute
        )
        load_model_weights(model, folder / "model")
        engine = build_engine(
            config,
            model,
            processor,
            SpecialTokens.from_pretrained(folder / "model", processor, model.model_config.num_embeddings),
        )
        for sent, ours in pairs:
            parts = ours if ours[-1]["type"] == "text" else [*ours, sent[-1]]
            prompt = encode_messages([{"role": "user", "content": parts}], processor)
            (group,) = engine.generate([GenerationRequest("one", prompt, 1)], SamplingParams(6, temperature=0))
            (rollout,) = group.rollouts
            answer = ask(client, *sent, extra_body=reading)
            assert answer.usage.prompt_tokens == len(prompt.token_ids)
            assert answer.choices[0].message.content == processor.decode(rollout.token_ids)
            assert answer.choices[0].finish_reason == rollout.finish_reason
            assert answer.usage.completion_tokens == len(rollout.token_ids)


def test_concurrent_requests_get_their_own_responses(client: openai.OpenAI) -> None:
    alone = [ask(client, text(question)).choices[0].message.content for question in QUESTIONS]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda question: ask(client, text(question)), QUESTIONS * 3))
    assert [answer.choices[0].message.content for answer in together] == alone * 3


def test_several_responses_follow_the_seed(client: openai.OpenAI) -> None:
    first, again, other = (
        [choice.message.content for choice in ask(client, text("when?"), n=3, temperature=1, seed=seed).choices]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(set(first)) > 1


def test_a_request_without_a_seed_gets_a_new_one(client: openai.OpenAI) -> None:
    answers = [ask(client, text("when?"), temperature=1, max_tokens=12) for _ in range(4)]
    assert len({answer.choices[0].message.content for answer in answers}) > 1


def test_a_stop_text_is_cut_out_of_the_response(client: openai.OpenAI) -> None:
    whole = ask(client, text("when?"), max_tokens=12).choices[0].message.content
    stop = whole[len(whole) // 2 :][:2]
    assert len(stop) == 2
    answer = ask(client, text("when?"), max_tokens=12, stop=[stop, "never in the text"])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("options", [{}, {"n": 3, "temperature": 1, "seed": 5}, {"stop": ["e", "xyz"]}], ids=str)
def test_a_streamed_response_equals_the_whole_one(client: openai.OpenAI, options: dict[str, Any]) -> None:
    whole = ask(client, text("when?"), max_tokens=12, **options)
    *chunks, last = ask(
        client, text("when?"), max_tokens=12, stream=True, stream_options={"include_usage": True}, **options
    )
    assert (last.choices, last.usage) == ([], whole.usage)
    assert {chunk.id for chunk in chunks} == {last.id}
    choices = [choice for chunk in chunks for choice in chunk.choices]
    for expected in whole.choices:
        role, *pieces, end = [choice for choice in choices if choice.index == expected.index]
        assert (role.delta.role, end.finish_reason) == ("assistant", expected.finish_reason)
        assert "".join(piece.delta.content for piece in pieces) == expected.message.content


def test_repetition_penalty_of_a_request_is_applied(client: openai.OpenAI) -> None:
    plain, penalized = (
        ask(client, text("when?"), max_tokens=12, extra_body={"repetition_penalty": penalty}).choices[0].message.content
        for penalty in (1.0, 100.0)
    )
    assert penalized != plain


def test_top_k_of_one_is_greedy(client: openai.OpenAI) -> None:
    greedy = ask(client, text("when?")).choices[0].message.content
    answer = ask(client, text("when?"), temperature=1, n=4, extra_body={"top_k": 1})
    assert {choice.message.content for choice in answer.choices} == {greedy}


def test_a_conversation_and_the_list_of_models(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "when?"}]
    assert client.chat.completions.create(model="model", messages=messages, max_tokens=2).choices[0].message
    assert [model.id for model in client.models.list()] == ["model"]


class Recorder:
    """An engine that records the lengths of its prompts and responds with one token."""

    def __init__(self) -> None:
        self.prompt_lengths: list[int] = []

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, *, on_token: OnToken | None
    ) -> list[RolloutGroup]:
        self.prompt_lengths += [len(request.prompt.token_ids) for request in requests]
        return [RolloutGroup(request.id, (Rollout((1,), (0.0,), FinishReason.STOP, 0),)) for request in requests]


@pytest.fixture
def processor(folder: Path) -> PromptProcessor:
    return PromptProcessor.from_pretrained(folder / "model", ModelConfig.from_pretrained(folder / "model"))


def server_of(engine: Any, processor: PromptProcessor) -> ChatServer:
    return ChatServer(("127.0.0.1", 0), "model", cast(LocalEngine, engine), processor, Limits(400, 8, 4, None))


class Stuttering:
    """An engine that samples a token, waits for `go_on`, and fails."""

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams, *, on_token: OnToken) -> Any:
        on_token(0, 0, 40)
        assert self.go_on.wait(HANG_S)
        raise RuntimeError("out of memory")


def test_a_token_is_sent_before_the_next_one_is_sampled(processor: PromptProcessor) -> None:
    """An error that follows is sent as an event, since the status was 200."""
    engine = Stuttering()
    server = server_of(engine, processor)
    with server.listening(), ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.run)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", timeout=HANG_S)
        stream = iter(ask(client, text("when?"), stream=True))
        assert next(stream).choices[0].delta.content == ""
        assert next(stream).choices[0].delta.content == processor.decode([40]) != ""
        engine.go_on.set()
        with pytest.raises(openai.APIError, match="RuntimeError: out of memory"):
            next(stream)
        server.stop()
        running.result()


def test_many_clients_may_connect_at_once(processor: PromptProcessor) -> None:
    server = server_of(Recorder(), processor)
    barrier = threading.Barrier(150)

    def is_healthy(_: int) -> bool:
        barrier.wait()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=HANG_S) as answer:
            return answer.status == 200

    with server.listening(), ThreadPoolExecutor(150) as pool:
        assert all(pool.map(is_healthy, range(150)))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_has_left_is_not_answered(processor: PromptProcessor, stream: bool) -> None:
    engine = Recorder()
    server = server_of(engine, processor)
    with server.listening(), ThreadPoolExecutor(2) as pool:
        url = f"http://127.0.0.1:{server.port}/v1"
        messages = [{"role": "user", "content": "when? " * 50}]
        body = json.dumps({"messages": messages, "stream": stream}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(head + body)
            while server._batcher._waiting.empty():  # `run` has not been called yet
                time.sleep(0.01)
        (left,) = server._batcher._waiting.queue
        deadline = time.monotonic() + HANG_S
        while not left.result.cancelled():  # the event loop sees the closed connection a moment later
            assert time.monotonic() < deadline, "the prompt was not cancelled"
            time.sleep(0.01)
        running = pool.submit(server.run)
        stays = pool.submit(ask, openai.OpenAI(base_url=url, api_key="none", timeout=HANG_S), text("when?"))
        prompt_tokens = stays.result().usage.prompt_tokens
        server.stop()
        running.result()
    assert engine.prompt_lengths == [prompt_tokens]


def test_requests_that_wait_at_shutdown_get_503(processor: PromptProcessor) -> None:
    server = server_of(Recorder(), processor)
    with ThreadPoolExecutor(1) as pool:
        with server.listening():
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0)
            waits = pool.submit(ask, client, text("when?"))
            while server._batcher._waiting.empty():
                assert not waits.done()
        with pytest.raises(openai.InternalServerError, match="shutting down") as raised:
            waits.result()
        assert raised.value.status_code == 503


def test_connections_above_the_limit_get_503(processor: PromptProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 2)
    server = server_of(Recorder(), processor)
    address = ("127.0.0.1", server.port)
    with server.listening(), ExitStack() as stack:
        for _ in range(2):
            other = stack.enter_context(socket.create_connection(address, timeout=HANG_S))
            other.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert other.recv(1000).startswith(b"HTTP/1.1 200")
        with pytest.raises(urllib.error.HTTPError) as raised:
            urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=HANG_S)
        assert raised.value.code == 503
        assert "2 open connections" in json.load(raised.value)["error"]["message"]
