"""Tests of faults with a real server: sampling continues or fails, no response of old weights counts, nothing hangs."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_vcr1.checkpoint.hf_stream import stream_hf_tensors
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.model.video_language_model import VideoLanguageModel
from megatron_vcr1.rollout.engine import EngineError, SamplingParams
from megatron_vcr1.rollout.sglang.engine import SglangEngine
from megatron_vcr1.rollout.sglang.http import weight_version
from tests.limits import HANG_S
from tests.ports import free_ports
from tests.rollout.sglang import model_dir
from tests.rollout.sglang.conftest import (
    ENVIRONMENT,
    Serving,
    change,
    is_alive,
    largest_difference,
    load,
    requests,
    settings,
    start_with,
    wait_until_gone,
)
from tests.rollout.sglang.fake_server import Reply, proxy

pytestmark = [pytest.mark.xdist_group("sglang"), pytest.mark.one_lane]

TOLERANCE = 1e-4
Start = Callable[..., SglangEngine]


def versions(groups: Any) -> set[int]:
    return {rollout.policy_version for group in groups for rollout in group.rollouts}


def test_status_500_is_retried(start_engine: Start, model: VideoLanguageModel, serving: Serving) -> None:
    failures = iter([(500, {"error": "broken"}), (503, {"error": "busy"})])

    def intervene(path: str, body: Any) -> Reply | None:
        return next(failures, None) if path == "/generate" else None

    with proxy(serving.url, intervene) as front:
        engine = start_engine(urls=[front.url])
        engine.update_weights(stream_hf_tensors(model), 1)
        sent = requests(2)
        groups = engine.generate(sent, SamplingParams(8))
        assert largest_difference(model, sent, groups) < TOLERANCE
        assert front.count("/generate") == len(sent) + 2


def test_a_refused_weight_update_is_repeated(start_engine: Start, model: VideoLanguageModel, serving: Serving) -> None:
    refusals = iter([(400, {"success": False, "message": "no"})])

    def intervene(path: str, body: Any) -> Reply | None:
        return next(refusals, None) if path == "/update_weights_from_distributed" else None

    with proxy(serving.url, intervene) as front:
        engine = start_engine(urls=[front.url], weight_sync="broadcast")
        engine.update_weights(stream_hf_tensors(model), 1)
        assert engine.generate(requests(1, ("v",)), SamplingParams(4))[0].rollouts[0].policy_version == 1


def test_a_server_that_refuses_every_weight_update_gets_no_requests(
    start_engine: Start, model: VideoLanguageModel, serving: Serving
) -> None:
    def intervene(path: str, body: Any) -> Reply | None:
        # After the first bucket of a pass: the weights are a mixture of old and new.
        refuses = path == "/update_weights_from_tensor" and front.count(path) > 1
        return (400, {"success": False, "message": "out of memory"}) if refuses else None

    with proxy(serving.url, intervene) as front:
        engine = start_engine(urls=[front.url], weight_sync="tensor")
        with pytest.raises(EngineError, match="no SGLang server took over the weights of version 1"):
            engine.update_weights(stream_hf_tensors(model), 1)
        assert weight_version(serving.url) == "loading"
        with pytest.raises(EngineError):
            engine.generate(requests(1, ("",)), SamplingParams(4))
        assert front.count("/generate") == 0


def test_a_hung_server_times_out_and_returns(start_engine: Start, model: VideoLanguageModel, serving: Serving) -> None:
    engine = start_engine()
    engine.update_weights(stream_hf_tensors(model), 1)
    engine.generate(requests(1, ("v",)), SamplingParams(4))
    engine._section = engine._section.model_copy(update={"request_timeout_s": 20})
    server = serving.server()
    sent, groups = requests(2, ("", "v")), []
    thread = threading.Thread(target=lambda: groups.extend(engine.sample(sent, SamplingParams(8))))
    os.kill(server.pid, signal.SIGSTOP)
    try:
        thread.start()
        thread.join(22)
        assert not groups
    finally:
        os.kill(server.pid, signal.SIGCONT)
    thread.join(HANG_S)
    assert largest_difference(model, sent, groups) < TOLERANCE
    assert versions(groups) == {1}


def test_a_server_that_dies_while_sampling_is_restarted_and_gets_the_policys_weights(
    start_engine: Start, model: VideoLanguageModel, serving: Serving
) -> None:
    engine = start_engine(weight_sync="broadcast")
    change(model, seed=1)
    engine.update_weights(stream_hf_tensors(model), 1)
    server = serving.server()

    def kill() -> None:
        serving.wait_until_sampling()
        server.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    sent = requests(32, ("", "v"))
    groups = engine.generate(sent, SamplingParams(400, top_p=0.99))
    killer.join(HANG_S)
    assert not is_alive(server.pid)
    assert versions(groups) == {1}  # the restarted server had version 0 at first
    assert largest_difference(model, sent, groups) < TOLERANCE


def test_a_server_that_dies_between_two_buckets_of_an_update(
    start_engine: Start, model: VideoLanguageModel, serving: Serving
) -> None:
    killed: list[psutil.Process] = []
    update = "/update_weights_from_distributed"

    def intervene(path: str, body: Any) -> Reply | None:
        if path == update and front.count(update) == 2 and not killed:
            killed.append(serving.server())
            killed[0].kill()
        return None

    with proxy(serving.url, intervene) as front:
        engine = start_engine(urls=[front.url], weight_sync="broadcast", request_timeout_s=HANG_S)
        change(model, seed=2)
        engine.update_weights(stream_hf_tensors(model), 1)
        assert killed
        sent = requests(2)
        groups = engine.generate(sent, SamplingParams(8))
        assert versions(groups) == {1}
        assert largest_difference(model, sent, groups) < TOLERANCE


def processes_of(engine: SglangEngine) -> list[psutil.Process]:
    """Return the server that the engine started, followed by the server's own processes."""
    assert engine._fleet.processes is not None
    [guard] = engine._fleet.processes.guard_pids()
    return psutil.Process(guard).children(recursive=True)


def test_a_server_that_the_run_starts_itself(
    world: None, sglang_python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses two ranks, and a model of the other family with tied embeddings and without safetensors (as if imported)."""
    cpus = sorted(os.sched_getaffinity(0))
    for key, value in (ENVIRONMENT | {"SGLANG_CPU_OMP_THREADS_BIND": f"{cpus[0]}|{cpus[-1]}"}).items():
        monkeypatch.setenv(key, value)
    folder = model_dir.create("qwen2_vl", tmp_path / "model")
    weights = folder / "model.safetensors"
    run = settings(tmp_path, folder, sglang_python, port=free_ports(), weight_sync="disk", tensor=2)
    config = RunConfig.model_validate(run)
    model = load(config)
    weights.rename(tmp_path / "elsewhere.safetensors")
    engine = start_with(config)
    try:
        sent = requests(4)
        with pytest.raises(EngineError, match=r"'none' instead of 'default'"):
            engine.generate(sent, SamplingParams(8))
        engine.update_weights(iter(stream_hf_tensors(model)), 5)
        assert largest_difference(model, sent, engine.generate(sent, SamplingParams(8))) < TOLERANCE
        # A restart loads the weights of the last sync by disk: nothing has to be sent again.
        processes_of(engine)[0].kill()
        groups = engine.generate(sent, SamplingParams(8))
        assert versions(groups) == {5}
        assert largest_difference(model, sent, groups) < TOLERANCE
        for version, channel in enumerate(("broadcast", "tensor"), 6):
            engine._weight_sync._channel_name = channel
            change(model, seed=version)
            engine.update_weights(iter(stream_hf_tensors(model)), version)
            assert largest_difference(model, sent, engine.generate(sent, SamplingParams(8))) < TOLERANCE
        processes = processes_of(engine)
    finally:
        engine.close()
    wait_until_gone([process.pid for process in processes])
