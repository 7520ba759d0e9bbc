"""A real SGLang server on the CPU, shared by all tests that need one; `tools/test.sh --with-sglang` installs SGLang."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.config.rendering import render_toml
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.packed_batch import pack
from megatron_vcr1.model.video_language_model import VideoLanguageModel, build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.engine import GenerationRequest
from megatron_vcr1.rollout.sglang.engine import SglangEngine
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from megatron_vcr1.types import RolloutGroup
from tests.limits import HANG_S
from tests.model import tiny
from tests.ports import free_ports
from tests.rollout.sglang import model_dir

SERVER_TIMEOUT_S = HANG_S  # enough on a busy machine
TOKENS = SpecialTokens(frozenset([model_dir.END]), (tiny.IMAGE_PAD, tiny.VIDEO_PAD, tiny.VISION_START, tiny.VISION_END))
SERVER_ARGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--mm-attention-backend", "sdpa"),
    *("--disable-cuda-graph", "--max-total-tokens", "20000", "--max-running-requests", "64"),
)
# Compilation would take longer than it saves.
ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def sglang_python() -> Path:
    """Return the interpreter of the environment that tools/sglang_venv.sh creates; skip the test if there is none."""
    interpreter = os.environ.get("VCR1_SGLANG_PYTHON")
    if not interpreter:
        pytest.skip("SGLang is not installed: bash tools/test.sh --with-sglang")
    return Path(interpreter)


def settings(folder: Path, model: Path, interpreter: Path, **sglang: Any) -> dict[str, Any]:
    """Return the settings of a run with SGLang on the CPU."""
    section = {"python": interpreter, "server_args": SERVER_ARGS, "memory_fraction": 0.05, "colocated": False}
    return {
        "model": {"path": model, "dtype": "float32"},
        "train": {"run_dir": folder / "run"},
        "rollout": {"engine": "sglang"},
        "sglang": section
        | {"weight_sync_bucket_mb": 1, "startup_timeout_s": SERVER_TIMEOUT_S, "request_timeout_s": SERVER_TIMEOUT_S}
        | sglang,
    }


@dataclass(frozen=True)
class Serving:
    """A running `vcr1 rollout serve` with one server."""

    url: str
    process: subprocess.Popen[str]
    model_dir: Path
    folder: Path
    interpreter: Path

    def server(self) -> psutil.Process:
        """Return the main process of the server; a restart changes it."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it has ended since it was listed
                arguments = process.cmdline()
                if "sglang.launch_server" in arguments and "-I" not in arguments:  # -I: the guard
                    return process
        raise AssertionError("no server")

    def config(self, **sglang: Any) -> RunConfig:
        section = {"urls": [self.url]} | sglang
        return RunConfig.model_validate(settings(self.folder, self.model_dir, self.interpreter, **section))

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + SERVER_TIMEOUT_S
        while not _answers(self.url):
            assert time.monotonic() < deadline, "the server is not back"
            time.sleep(0.5)

    def wait_until_sampling(self) -> None:
        deadline = time.monotonic() + HANG_S
        while not any(load["num_running_reqs"] for load in self._loads()):
            assert time.monotonic() < deadline, "the server does not sample"
            time.sleep(0.05)

    def _loads(self) -> list[dict[str, Any]]:
        return httpx.get(f"{self.url}/v1/loads?include=core", timeout=HANG_S, trust_env=False).json()["loads"]


def is_alive(pid: int) -> bool:
    """Return whether a process runs. One that has ended may be listed until its parent, or init, has noticed."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until_gone(pids: Sequence[int]) -> None:
    deadline = time.monotonic() + HANG_S
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, "some processes are left"
        time.sleep(0.05)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health_generate", timeout=HANG_S, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="session")
def serving(sglang_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Run one server for the whole session, and check at the end that SIGINT ends it with all of its processes."""
    with serve("qwen2_5_vl", tmp_path_factory.mktemp("serving"), sglang_python) as server:
        yield server


@contextmanager
def serve(family: str, folder: Path, sglang_python: Path) -> Iterator[Serving]:
    """Run a server with a tiny model of a family."""
    port = free_ports()
    model = model_dir.create(family, folder / "model")
    config = RunConfig.model_validate(settings(folder, model, sglang_python, port=port, max_restarts=20))
    (folder / "run.toml").write_text(render_toml(config, documented=False))
    command = [sys.executable, "-m", "megatron_vcr1", "rollout", "serve", str(folder / "run.toml")]
    process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: [lines.put(line) for line in process.stdout], daemon=True).start()
    try:
        log = folder / "run" / "sglang" / "logs" / f"server_{port}.log"
        try:
            line = lines.get(timeout=SERVER_TIMEOUT_S)
        except queue.Empty:
            pytest.fail(f"the server is not ready: {log.read_text()[-3000:]}")
        assert line == f"ready: http://127.0.0.1:{port}\n"
        yield Serving(line.split()[1], process, model, folder, sglang_python)
        descendants = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(signal.SIGINT)
        assert process.wait(HANG_S) == 0
        wait_until_gone(descendants)
    finally:
        process.kill()


@pytest.fixture(scope="module")
def world() -> Iterator[None]:
    with mesh.world(ParallelSection()):
        yield


@pytest.fixture
def model(world: None, serving: Serving) -> VideoLanguageModel:
    """Return the policy, with the weights that the server was started with."""
    return load(serving.config())


def load(config: RunConfig) -> VideoLanguageModel:
    model = build_model(ModelConfig.from_pretrained(config.model.path), config.model, config.parallel, config.recompute)
    load_model_weights(model, config.model.path)
    return model


def change(model: VideoLanguageModel, seed: int) -> None:
    """Change all weights, as an optimizer step might."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


def start_with(
    config: RunConfig, tokens: SpecialTokens = TOKENS, model_config: ModelConfig | None = None
) -> SglangEngine:
    """Start an engine with the settings of a run, as `build_engine` does."""
    return SglangEngine.start(
        config.sglang,
        config.model,
        model_config or ModelConfig.from_pretrained(config.model.path),
        tokens,
        run_dir=config.train.run_dir,
        seed=config.train.seed,
        weights_change_while_sampling=config.grpo.one_step_off,
    )


@pytest.fixture
def start_engine(world: None, serving: Serving) -> Iterator[Callable[..., SglangEngine]]:
    """Return a function that starts an engine on the session's server, with settings of [sglang]."""
    engines = []

    def start(**sglang: Any) -> SglangEngine:
        config = serving.config(**sglang)
        engines.append(start_with(config))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def requests(
    num_responses: int, kinds: Sequence[str] = ("", "i", "v", "ivv"), seed: int = 3, *, timestamps: bool = False
) -> list[GenerationRequest]:
    """Return requests with text, an image, a video, and all of them."""
    prompts = [tiny.prompt(kind, seed=seed, timestamps=timestamps) for kind in kinds]
    return [
        GenerationRequest(kind or "text", prompt, num_responses) for kind, prompt in zip(kinds, prompts, strict=True)
    ]


def largest_difference(
    model: VideoLanguageModel,
    sent: Sequence[GenerationRequest],
    groups: Sequence[RolloutGroup],
    temperature: float = 1.0,
) -> float:
    """Return the largest difference between the server's log-probs and the model's, over all tokens."""
    differences = []
    for request, group in zip(sent, groups, strict=True):
        assert group.id == request.id
        responses = tuple(torch.tensor(rollout.token_ids) for rollout in group.rollouts)
        batch = pack([Group(request.id, request.prompt, responses)], model.model_config)
        with torch.no_grad():
            expected = model.log_probs(model(batch), batch.target_ids, temperature=temperature)
        found = torch.tensor([value for rollout in group.rollouts for value in rollout.log_probs])
        differences.append((expected - found).abs().max().item())
    return max(differences)
