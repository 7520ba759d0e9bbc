"""`vcr1 serve` as its clients know it: the command in a process of its own, asked by the `openai` package."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import openai
import pytest
import torch
from PIL import Image

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.encoding import encode_messages
from megatron_vcr1.data.manifest import read_manifest
from megatron_vcr1.data.processor import read_processor
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.qwen_vl import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.build import build_engine
from megatron_vcr1.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams
from megatron_vcr1.serving.server import ChatServer, Limits, listening
from megatron_vcr1.types import FinishReason, Rollout, RolloutGroup
from tests.training import workspace

ROOT = Path(__file__).parents[3]
QUESTIONS = ["when?", "where?", "which and when?", "how good?"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = workspace.create(tmp_path_factory.mktemp("serve"), num_videos=2)
    template = folder / "model" / "chat_template.jinja"
    picture = "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == 'video' %}"
    template.write_text(template.read_text().replace("{% if part.type == 'video' %}", picture))
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "megatron_vcr1", "serve", "--model", str(folder / "model"), "--port", "0"]
    options = ["--dtype", "float32", "--files", str(folder / "data"), "--max-new-tokens", "12"]
    options += ["--max-prompt-tokens", "400", "--batch", "4"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    process = subprocess.Popen([*command, *options], env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        announced = process.stdout.readline()
        assert announced.startswith("model: http://127.0.0.1:")
        yield announced.split()[1]
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)


def ask(client: openai.OpenAI, *parts: dict[str, Any], **options: Any) -> Any:
    settings = {"model": "model", "max_tokens": 6, "temperature": 0} | options
    return client.chat.completions.create(messages=[{"role": "user", "content": list(parts)}], **settings)


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def video(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def picture() -> str:
    pixels = torch.randint(0, 256, (60, 90, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def first_video(folder: Path) -> Path:
    path = read_manifest(folder / "data" / "train.jsonl")[0].video
    assert isinstance(path, str)
    return Path(path)


def test_answers_are_those_of_the_engine(folder: Path, client: openai.OpenAI, tmp_path: Path) -> None:
    config = RunConfig.model_validate({"model": {"path": folder / "model", "dtype": "float32"}})
    processor = read_processor(folder / "model")
    (tmp_path / "picture.png").write_bytes(base64.b64decode(picture().partition(",")[2]))
    clip = first_video(folder)
    sent = [
        [text("when?")],
        [{"type": "image_url", "image_url": {"url": picture()}}, text("where?")],
        [video(clip.as_uri()), text("which?")],
        [video("data:video/mp4;base64," + base64.b64encode(clip.read_bytes()).decode()), text("which?")],
    ]
    ours = [
        [text("when?")],
        [{"type": "image", "image": str(tmp_path / "picture.png")}, text("where?")],
        [{"type": "video", "video": str(clip), "max_frames": 4}, text("which?")],
        [{"type": "video", "video": str(clip), "max_frames": 4}, text("which?")],
    ]
    reading = {"media_io_kwargs": {"video": {"num_frames": 4}}}
    with mesh.world(config.parallel):
        model = build_model(ModelConfig.from_pretrained(folder / "model"), config)
        load_model_weights(model, folder / "model")
        engine = build_engine(config, model, processor)
        for theirs, parts in zip(sent, ours, strict=True):
            prompt = encode_messages([{"role": "user", "content": parts}], processor)
            (group,) = engine.generate([GenerationRequest("one", prompt, 1)], SamplingParams(6, temperature=0))
            (rollout,) = group.rollouts
            answer = ask(client, *theirs, extra_body=reading)
            assert answer.choices[0].message.content == processor.decode(rollout.token_ids)
            assert answer.choices[0].finish_reason == rollout.finish_reason
            assert answer.usage.prompt_tokens == len(prompt.token_ids)
            assert answer.usage.completion_tokens == len(rollout.token_ids)


def test_requests_at_the_same_time_get_their_own_answers(client: openai.OpenAI) -> None:
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


def test_a_request_without_a_seed_is_drawn_anew(client: openai.OpenAI) -> None:
    answers = [ask(client, text("when?"), temperature=1, max_tokens=12) for _ in range(4)]
    assert len({answer.choices[0].message.content for answer in answers}) > 1


class Recorder:
    """An engine that notes its prompts' numbers of tokens, and answers with a token."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[RolloutGroup]:
        self.asked += [len(one.prompt.token_ids) for one in requests]
        return [RolloutGroup(one.id, (Rollout((1,), (0.0,), FinishReason.STOP, 0),)) for one in requests]


def test_many_clients_may_come_at_once(folder: Path) -> None:
    limits = Limits(400, 8, 4, None)
    engine, processor = cast(RolloutEngine, Recorder()), read_processor(folder / "model")
    server = ChatServer(("127.0.0.1", 0), "model", engine, processor, limits)
    barrier = threading.Barrier(150)

    def is_healthy(_: int) -> bool:
        barrier.wait()
        with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/health", timeout=60) as answer:
            return answer.status == 200

    with listening(server), ThreadPoolExecutor(150) as pool:
        assert all(pool.map(is_healthy, range(150)))


def test_who_has_gone_is_not_answered(folder: Path) -> None:
    engine, limits = Recorder(), Limits(400, 8, 4, None)
    server = ChatServer(
        ("127.0.0.1", 0), "model", cast(RolloutEngine, engine), read_processor(folder / "model"), limits
    )
    with listening(server), ThreadPoolExecutor(2) as pool:
        url = f"http://127.0.0.1:{server.server_port}/v1"
        with pytest.raises(openai.APITimeoutError):  # nobody answers yet
            ask(openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=0.5), text("when? " * 50))
        answering = pool.submit(server.answer_forever)
        stays = pool.submit(ask, openai.OpenAI(base_url=url, api_key="none", timeout=60), text("when?"))
        prompt_tokens = stays.result().usage.prompt_tokens
        server.stop()
        answering.result()
    assert engine.asked == [prompt_tokens]


def test_the_limit_of_tokens_is_the_servers(client: openai.OpenAI) -> None:
    answer = ask(client, text("when?"), max_tokens=1000)
    assert answer.usage.completion_tokens <= 12
    assert ask(client, text("when?"), max_tokens=None, max_completion_tokens=1).usage.completion_tokens == 1


def test_nulls_and_neutral_values_are_as_if_left_out(client: openai.OpenAI) -> None:
    nulls = dict.fromkeys(("seed", "top_p", "n", "stop", "stream", "tools", "logit_bias"))
    neutral = {"presence_penalty": 0, "repetition_penalty": 1.0, "response_format": {"type": "text"}, "top_k": -1}
    expected = ask(client, text("when?")).choices[0].message.content
    assert ask(client, text("when?"), extra_body=nulls | neutral).choices[0].message.content == expected


def test_repetition_is_penalized_where_a_request_asks_for_it(client: openai.OpenAI) -> None:
    plain, penalized = (
        ask(client, text("when?"), max_tokens=12, extra_body={"repetition_penalty": penalty}).choices[0].message.content
        for penalty in (1.0, 100.0)
    )
    assert penalized != plain


def test_top_k_of_one_is_greedy(client: openai.OpenAI) -> None:
    greedy = ask(client, text("when?")).choices[0].message.content
    answer = ask(client, text("when?"), temperature=1, n=4, extra_body={"top_k": 1})
    assert {choice.message.content for choice in answer.choices} == {greedy}


def test_a_conversation_and_the_models_name(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "when?"}]
    assert client.chat.completions.create(model="model", messages=messages, max_tokens=2).choices[0].message
    assert [model.id for model in client.models.list()] == ["model"]


@pytest.mark.parametrize(
    "parts, options, message",
    [
        ([text("x")], {"stream": True}, "stream is not served here"),
        ([text("x")], {"logprobs": True}, "logprobs is not served here"),
        ([text("x")], {"extra_body": {"mm_processor_kwargs": {"fps": 1}}}, "mm_processor_kwargs is not served here"),
        ([text("x")], {"presence_penalty": 0.5}, "presence_penalty is not served here"),
        ([text("x")], {"extra_body": {"repetition_penalty": 0}}, "repetition_penalty: Input should be greater than 0"),
        ([text("x")], {"temperature": 1e-40}, "temperature 1e-40 is too small; 0 takes"),
        ([text("x")], {"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ([text("when? " * 500)], {}, "tokens; up to 400 are served"),
        ([text("<|video_pad|>")], {}, "stands for a picture"),
        ([video("http://127.0.0.1:1/a.mp4")], {}, "send data: URLs, or file:// URLs of this machine"),
        ([video("file:///etc/hostname")], {}, "is not below the folder"),
        ([video("data:video/mp4;base64,AAAA")], {}, "not a video|cannot be|damaged|Invalid data|no video"),
        ([{"type": "input_audio", "input_audio": {}}], {}, "messages.0.content"),
    ],
)
def test_a_bad_request_is_the_clients_and_says_why(
    client: openai.OpenAI, parts: list[dict[str, Any]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, *parts, **options)
    assert ask(client, text("when?")).choices  # and the server goes on


def test_a_link_out_of_the_folder(folder: Path, client: openai.OpenAI) -> None:
    link = folder / "data" / "link.mp4"
    link.symlink_to("/etc/hostname")
    for url in (link.as_uri(), f"{(folder / 'data').as_uri()}/../model/config.json", "file://elsewhere/a.mp4"):
        with pytest.raises(openai.BadRequestError, match=r"not below the folder|of this machine"):
            ask(client, video(url))


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"messages": []}', b"\xff"])
def test_a_body_that_is_no_request(url: str, body: bytes) -> None:
    request = urllib.request.Request(f"{url}/chat/completions", data=body, method="POST")
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request)
    assert raised.value.code == 400
    assert json.loads(raised.value.read())["error"]["type"] == "invalid_request_error"


def test_another_method_is_refused_in_the_same_form(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="501") as raised:
        urllib.request.urlopen(urllib.request.Request(f"{url}/models", method="DELETE"))
    assert "DELETE" in json.loads(raised.value.read())["error"]["message"]


def test_other_paths(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{url}/completions")
    with urllib.request.urlopen(url.removesuffix("/v1") + "/health") as answer:
        assert answer.status == 200
