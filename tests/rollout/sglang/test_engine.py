"""Tests with a real server: its log-probs equal the model's, before and after a weight sync by every channel."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.checkpoint.hf_stream import stream_hf_tensors
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.video_language_model import VideoLanguageModel
from megatron_vcr1.rollout.engine import EngineError, GenerationRequest, SamplingParams
from megatron_vcr1.rollout.sglang import payload
from megatron_vcr1.rollout.sglang.channels.device_memory import DeviceMemoryChannel
from megatron_vcr1.rollout.sglang.engine import SglangEngine
from megatron_vcr1.rollout.sglang.http import call, weight_version
from megatron_vcr1.rollout.sglang.memory import RELEASED, WEIGHTS_ONLY, MemoryRelease
from megatron_vcr1.types import FinishReason
from tests.limits import HANG_S
from tests.model import tiny
from tests.rollout.sglang import model_dir
from tests.rollout.sglang.conftest import TOKENS, Serving, change, largest_difference, requests, start_with
from tests.rollout.sglang.fake_server import FakeServer, Reply

pytestmark = pytest.mark.xdist_group("sglang")

TOLERANCE = 1e-4
Start = Callable[..., SglangEngine]


@pytest.mark.parametrize("transport", ["inline", "file"])
def test_responses_to_text_images_and_videos(
    start_engine: Start, model: VideoLanguageModel, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    # The server reads files of one folder, to which other tests and other runs on this machine write, too.
    files: list[Path] = []
    pack_to_file = payload.pack_to_file

    def record_file(contents: payload.Payload) -> str:
        packed = pack_to_file(contents)
        files.append(Path(packed.removeprefix(payload.FILE_PREFIX)))
        assert files[-1].exists()
        return packed

    monkeypatch.setattr(payload, "pack_to_file", record_file)
    engine = start_engine(transport=transport)
    engine.update_weights(stream_hf_tensors(model), 0)
    sent = requests(8, ("", "i", "v", "vv", "vi", "ivv"))
    groups = engine.generate(sent, SamplingParams(12))
    assert largest_difference(model, sent, groups) < TOLERANCE
    for request, group in zip(sent, groups, strict=True):
        # The prompt is computed once per group, except for its last token: every response needs its logits.
        assert group.cached_tokens == (len(request.prompt.token_ids) - 1,) * 8
        assert len({rollout.token_ids for rollout in group.rollouts}) > 4
        for rollout in group.rollouts:
            assert rollout.policy_version == 0
            assert not set(TOKENS.never_sampled) & set(rollout.token_ids)
            ended = rollout.token_ids[-1] == model_dir.END
            assert rollout.finish_reason == (FinishReason.STOP if ended else FinishReason.LENGTH)
            assert model_dir.END not in rollout.token_ids[:-1]
            assert ended or len(rollout.token_ids) == 12
    assert bool(files) == (transport == "file") and not any(file.exists() for file in files)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(12, temperature=0.6),
        SamplingParams(12, temperature=1.5, top_p=0.7),
        SamplingParams(12, top_k=5),
        SamplingParams(12, temperature=0),
    ],
    ids=["cold", "top-p", "top-k", "greedy"],
)
def test_log_probs_are_over_the_whole_vocabulary_at_the_sampling_temperature(
    start_engine: Start, model: VideoLanguageModel, params: SamplingParams
) -> None:
    engine = start_engine()
    engine.update_weights(stream_hf_tensors(model), 0)
    sent = requests(4, ("", "v"))
    groups = engine.generate(sent, params)
    assert largest_difference(model, sent, groups, params.temperature or 1.0) < TOLERANCE
    if params.temperature == 0:
        assert all(len({rollout.token_ids for rollout in group.rollouts}) == 1 for group in groups)


def test_a_stop_string_ends_a_response_with_the_token_that_completes_it(
    start_engine: Start, model: VideoLanguageModel
) -> None:
    engine = start_engine()
    engine.update_weights(stream_hf_tensors(model), 0)
    [free] = engine.generate(requests(1, ("v",)), SamplingParams(12, temperature=0))
    characters = [index for index in free.rollouts[0].token_ids if 2 <= index < 97]
    if not characters:
        pytest.fail("choose another seed: the greedy response has no character")
    [stopped] = engine.generate(requests(1, ("v",)), SamplingParams(12, temperature=0, stop=(chr(characters[0] + 30),)))
    expected = free.rollouts[0].token_ids[: free.rollouts[0].token_ids.index(characters[0]) + 1]
    assert stopped.rollouts[0].token_ids == expected
    assert stopped.rollouts[0].finish_reason == FinishReason.STOP


@pytest.fixture(scope="module")
def checksums() -> set[str]:
    """Return the checksums of the server's weights after syncs of the same weights."""
    return set()


@pytest.mark.parametrize("weight_sync", ["disk", "broadcast", "tensor", "device"])
def test_log_probs_are_those_of_the_new_weights_after_a_sync(
    start_engine: Start, model: VideoLanguageModel, serving: Serving, checksums: set[str], weight_sync: str
) -> None:
    """Also checks that the weights are those that SGLang loads from a Hugging Face directory, bit for bit."""
    engine = start_engine(weight_sync="tensor" if weight_sync == "device" else weight_sync)
    if weight_sync == "device":  # with memory of the CPU in place of a GPU's
        engine._weight_sync._device_channel = DeviceMemoryChannel("gpu 0", {serving.url: ["gpu 0"]}, timeout_s=HANG_S)
    sent = requests(4)
    engine.update_weights(stream_hf_tensors(model), 1)
    before = engine.generate(sent, SamplingParams(12))
    assert largest_difference(model, sent, before) < TOLERANCE
    change(model, seed=7)
    assert largest_difference(model, sent, before) > 100 * TOLERANCE
    engine.update_weights(stream_hf_tensors(model), 2)
    after = engine.generate(sent, SamplingParams(12))
    assert largest_difference(model, sent, after) < TOLERANCE
    assert {rollout.policy_version for group in after for rollout in group.rollouts} == {2}
    assert engine.policy_version == 2
    checksums.add(
        call(serving.url, "POST", "/weights_checker", {"action": "checksum"}, timeout_s=HANG_S)["per_engine_checksum"]
    )
    assert len(checksums) == 1
    if weight_sync == "disk":
        folder = serving.folder / "run" / "sglang" / "weights" / "replica_0"
        assert len(list(folder.iterdir())) == 1  # earlier versions are removed


def test_weights_of_another_run_are_detected(start_engine: Start, model: VideoLanguageModel) -> None:
    first = start_engine()
    first.update_weights(stream_hf_tensors(model), 0)
    second = start_engine()
    with pytest.raises(EngineError, match=r"no server has the policy's weights before the next update: .*'0@"):
        second.generate(requests(1, ("",)), SamplingParams(4))
    second.update_weights(iter(stream_hf_tensors(model)), 0)  # a stream that can be iterated only once
    second.generate(requests(1, ("",)), SamplingParams(4))
    # The first engine finds its weights replaced, and sends them again.
    assert first.generate(requests(1, ("",)), SamplingParams(4))[0].rollouts[0].policy_version == 0


def test_abort_ends_running_requests(start_engine: Start, model: VideoLanguageModel, serving: Serving) -> None:
    engine = start_engine()
    engine.update_weights(stream_hf_tensors(model), 0)
    errors: list[BaseException] = []

    def sample() -> None:
        try:
            engine.sample(requests(32, ("", "v")), SamplingParams(450, top_p=0.99))
        except EngineError as error:
            errors.append(error)

    thread = threading.Thread(target=sample)
    thread.start()
    serving.wait_until_sampling()
    engine.abort()
    thread.join(HANG_S)
    assert not thread.is_alive()
    assert "sampling was aborted" in str(errors[0])
    engine.generate(requests(1, ("",)), SamplingParams(4))


def test_abort_also_stops_sampling_that_has_not_begun(world: None, tmp_path: Path) -> None:
    config = RunConfig.model_validate({"model": {"path": tmp_path}, "train": {"run_dir": tmp_path / "run"}})
    model_config = ModelConfig.from_dict(tiny.hf_config("qwen2_5_vl").to_dict())
    with FakeServer(lambda path, body: (200, {"tp_size": 1, "weight_version": "default"})) as server:
        config = config.model_copy(update={"sglang": config.sglang.model_copy(update={"urls": (server.url,)})})
        engine = start_with(config, model_config=model_config)
        engine.abort()  # as if the sampling thread had been started, and had not called `sample` yet
        with pytest.raises(EngineError, match="sampling was aborted"):
            engine.sample(requests(1, ("",)), SamplingParams(4))
        assert server.count("/generate") == 0
        engine.generate([], SamplingParams(4))  # a new call ends the abort
        engine.sample([], SamplingParams(4))


def pretended(folder: Path, server: FakeServer, **sglang: Any) -> SglangEngine:
    """Start an engine for a server that only pretends to be one, and that other replicas use, too."""
    settings = {
        "model": {"path": folder},
        "train": {"run_dir": folder / "run"},
        "sglang": {"urls": [server.url]} | sglang,
    }
    model_config = ModelConfig.from_dict(tiny.hf_config("qwen2_5_vl").to_dict())
    engine = start_with(RunConfig.model_validate(settings), model_config=model_config)
    engine._fleet = replace(engine._fleet, shared=True)
    return engine


def test_abort_ends_waiting_for_servers_that_other_replicas_use_too(world: None, tmp_path: Path) -> None:
    received, go_on = threading.Event(), threading.Event()

    def reply(path: str, body: Any) -> Reply:
        if path == "/generate":
            received.set()
            go_on.wait(HANG_S)
        return 200, {"tp_size": 1, "weight_version": "default"}

    with FakeServer(reply) as server, ThreadPoolExecutor(1) as pool:
        engine = pretended(tmp_path, server)
        responses = pool.submit(engine.sample, requests(1, ("",)), SamplingParams(4))
        assert received.wait(HANG_S)
        engine.abort()
        with pytest.raises(EngineError, match="sampling was aborted"):
            responses.result()
        assert server.count("/abort_request") == 0
        go_on.set()


def test_abort_while_a_prompt_is_packed_leaves_no_file(
    world: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "payloads"
    monkeypatch.setattr(payload, "payload_dir", lambda: folder)
    has_begun, is_aborted = threading.Event(), threading.Event()
    reply = (200, {"tp_size": 1, "weight_version": "default"})
    with FakeServer(lambda path, body: reply) as server, ThreadPoolExecutor(1) as pool:
        engine = pretended(tmp_path, server, transport="file")
        pack = engine._pack

        def pack_after_the_abort(request: GenerationRequest) -> str | None:
            has_begun.set()
            assert is_aborted.wait(HANG_S)
            return pack(request)

        engine._pack = pack_after_the_abort
        responses = pool.submit(engine.sample, requests(1, ("v",)), SamplingParams(4))
        assert has_begun.wait(HANG_S)
        engine.abort()
        is_aborted.set()
        with pytest.raises(EngineError, match="sampling was aborted"):
            responses.result()
        assert not list(folder.iterdir()) and server.count("/generate") == 0


def test_generation_continues_after_a_pause(start_engine: Start, model: VideoLanguageModel, serving: Serving) -> None:
    engine = start_engine()
    engine.update_weights(stream_hf_tensors(model), 0)
    sent, groups = requests(4, ("v",)), []
    call(serving.url, "POST", "/pause_generation", {"mode": "in_place"}, timeout_s=HANG_S)
    thread = threading.Thread(target=lambda: groups.extend(engine.sample(sent, SamplingParams(12))))
    thread.start()
    thread.join(1.0)
    assert thread.is_alive() and not groups
    call(serving.url, "POST", "/continue_generation", {}, timeout_s=HANG_S)
    thread.join(HANG_S)
    assert largest_difference(model, sent, groups) < TOLERANCE


def test_memory_release_and_resume(start_engine: Start, model: VideoLanguageModel, serving: Serving) -> None:
    """Checks only the calls and their order: without a GPU, there is no memory saver and nothing is freed."""
    engine = start_engine()
    engine.update_weights(stream_hf_tensors(model), 0)
    version = weight_version(serving.url)
    memory = MemoryRelease([serving.url], None, timeout_s=HANG_S)
    steps = (
        (memory.release, RELEASED),
        (memory.resume, ""),
        (memory.release, RELEASED),
        (memory.resume_weights, WEIGHTS_ONLY),
        (memory.release, RELEASED),  # after a sync that has failed
        (memory.resume_weights, WEIGHTS_ONLY),
        (memory.resume, ""),
    )
    for change_memory, marker in steps:
        for _ in range(2):  # the second call must do nothing: SGLang would end
            change_memory()
            assert weight_version(serving.url) == marker + version
    sent = requests(2, ("v",))
    assert largest_difference(model, sent, engine.generate(sent, SamplingParams(8))) < TOLERANCE


def test_memory_stays_from_the_weight_sync_to_the_end_of_the_rollout(
    start_engine: Start, model: VideoLanguageModel, serving: Serving
) -> None:
    engine = start_engine()
    engine._memory = MemoryRelease([serving.url], None, timeout_s=HANG_S)
    for version, sent in enumerate((requests(1), requests(1), [])):  # without requests, too
        engine.update_weights(stream_hf_tensors(model), version)
        # The KV cache is resumed after the sync, except in the first one, before which nothing was released.
        assert weight_version(serving.url).startswith(WEIGHTS_ONLY if version else "0@")
        groups = engine.generate(sent, SamplingParams(4))
        assert largest_difference(model, sent, groups) < TOLERANCE if sent else groups == []
        assert weight_version(serving.url).startswith(RELEASED)
    engine._memory.resume()


def test_memory_that_a_killed_run_left_released_is_resumed(
    start_engine: Start, model: VideoLanguageModel, serving: Serving
) -> None:
    MemoryRelease([serving.url], None, timeout_s=HANG_S).release()
    server = serving.server()
    engine = start_engine()
    engine.update_weights(stream_hf_tensors(model), 0)
    sent = requests(2, ("v",))
    assert largest_difference(model, sent, engine.generate(sent, SamplingParams(8))) < TOLERANCE
    assert serving.server().pid == server.pid


def test_experts_in_some_layers_only_are_refused(tmp_path: Path) -> None:
    """SGLang would give all layers experts, ignore the weights of the others, and sample from random ones."""
    config = ModelConfig.from_dict(tiny.hf_config("qwen3_vl_moe").to_dict())
    run = RunConfig.model_validate({"model": {"path": tmp_path}})
    with pytest.raises(UserError, match="3 of the model's 4 layers have experts, and SGLang supports experts in every"):
        SglangEngine.start(run.sglang, run.model, config, TOKENS, run_dir=tmp_path, seed=0)
