"""`vcr1 train` that is killed or stopped by signals ends like an undisturbed run, bit for bit.

VCR1_KILLS in the environment sets how often the run is killed; the default is small enough for the test suite.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vcr1.checkpoint.model_dir import MEGATRON_DIR
from megatron_vcr1.checkpoint.step_dirs import saved_steps
from megatron_vcr1.checkpoint.torch_dist import read_chunk, read_metadata
from megatron_vcr1.config.rendering import render_toml
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.parallel import mesh
from megatron_vcr1.training.train import train_in_world
from tests.commands import Process, vcr1
from tests.gloo import GlooPool
from tests.limits import HANG_S
from tests.training import workspace

pytestmark = pytest.mark.xdist_group("gloo")

NUM_KILLS = int(os.environ.get("VCR1_KILLS", "3"))
NUM_STEPS = 4 * NUM_KILLS  # a run does up to 3 steps before a kill, and more if this process is late
VALIDATION_STEPS = 3  # each validation starts decoding processes
TIMEOUT_S = HANG_S  # the machine may be loaded
TIMED = ("time/", "tokens_per_s", "tflops_per_s", "mfu", "memory/")


def _config(folder: Path, name: str, *, num_workers: int = 1, **parallel: int) -> RunConfig:
    source = {"manifest": folder / "data" / "train.jsonl", "thinking": False}
    source["rewards"] = ["tests.training.own_rewards:variety"]
    benchmark = {"name": "temporal_grounding", "manifest": folder / "data" / "train.jsonl", "max_samples": 3}
    return workspace.config(
        folder,
        "grpo",
        train={"stage": "grpo", "run_dir": folder / name, "num_steps": NUM_STEPS, "prompts_per_step": 4},
        data={**workspace.config(folder, "grpo").data.model_dump(), "sources": [source], "num_workers": num_workers},
        optimizer={"learning_rate": 1e-3, "warmup_steps": 2, "decay": "cosine"},
        checkpoint={"every_steps": 1, "export": "end", "keep_best": "temporal_grounding/mIoU"},
        validation={"benchmarks": [benchmark], "every_steps": VALIDATION_STEPS, "max_new_tokens": 4},
        parallel=parallel,
    )


class Command:
    """`vcr1 train` in a process of its own, with its decoding processes."""

    def __init__(self, config: RunConfig) -> None:
        self._run_dir = config.train.run_dir
        file = self._run_dir.with_suffix(".toml")
        file.write_text(render_toml(config, documented=False))
        log = self._run_dir.with_suffix(".log")
        self.process = Process(vcr1, "train", file, stdout=log, stderr=log)
        self._starts = self._num_lines("starts.jsonl")

    def _num_lines(self, name: str) -> int:
        file = self._run_dir / name
        return file.read_text().count("\n") if file.exists() else 0

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds or the command ends."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.process.poll() is None and not condition():
            assert time.monotonic() < deadline, self._run_dir.with_suffix(".log").read_text()
            time.sleep(0.002)

    def until_started(self) -> int:
        """Wait until the run has resumed; return the step of the checkpoint that it resumed from."""
        self.until(lambda: self._num_lines("starts.jsonl") > self._starts)
        return int(json.loads((self._run_dir / "starts.jsonl").read_text().splitlines()[-1])["step"])

    def until_steps(self, number: int) -> None:
        self.until(lambda: len(_steps(self._run_dir)) >= number)

    def until_validating(self) -> None:
        """Wait for a validation: its step is recorded already, and its own line is not."""

        def is_validating() -> bool:
            rows = (self._run_dir / "metrics.jsonl").read_text().splitlines()
            return bool(rows) and '"loss"' in rows[-1] and json.loads(rows[-1])["step"] % VALIDATION_STEPS == 0

        self.until(is_validating)

    def until_saving(self) -> None:
        self.until(lambda: any((self._run_dir / "checkpoints").glob(".step_*.partial-*")))

    def end(self) -> int:
        """Wait for the end of the command and return its exit code; none of its processes may survive."""
        try:
            code = self.process.wait()
            self._wait_for_workers()
        finally:
            if self._is_alive():
                os.killpg(self.process.pid, signal.SIGKILL)
        return code

    def _wait_for_workers(self) -> None:
        deadline = time.monotonic() + HANG_S  # decoding processes check every few seconds for their parent
        while self._is_alive():
            assert time.monotonic() < deadline, "processes of the run have outlived it"
            time.sleep(0.1)

    def _is_alive(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with an unreadable video and a finished, undisturbed run."""
    folder = workspace.create(tmp_path_factory.mktemp("survival"), num_videos=9)
    first = json.loads((folder / "data" / "train.jsonl").read_text().splitlines()[0])
    (folder / "data" / first["video"]).write_bytes(b"no video")
    assert Command(_config(folder, "undisturbed")).end() == 0
    return folder


def _steps(run_dir: Path) -> list[str]:
    """The lines of the training steps in metrics.jsonl; validations have lines of their own."""
    file = run_dir / "metrics.jsonl"
    return [line for line in file.read_text().splitlines() if '"loss"' in line] if file.exists() else []


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    rows = workspace.metrics(run_dir)
    return [{name: value for name, value in row.items() if not name.startswith(TIMED)} for row in rows]


def _texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir())}


def _assert_same(run_dir: Path, expected: Path) -> None:
    """Compare everything that the runs wrote, except for times."""
    assert _metrics(run_dir) == _metrics(expected)
    assert _texts(run_dir / "rollouts") == _texts(expected / "rollouts")
    assert (run_dir / "skipped.jsonl").read_text() == (expected / "skipped.jsonl").read_text()
    assert saved_steps(run_dir / "checkpoints") == saved_steps(expected / "checkpoints")
    last = f"checkpoints/step_{NUM_STEPS}"
    assert (run_dir / last / "state.json").read_text() == (expected / last / "state.json").read_text()
    mine, theirs = (read_metadata(path / last / MEGATRON_DIR) for path in (run_dir, expected))
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        for chunk, other in zip(tensor.chunks, theirs[key].chunks, strict=True):
            value = read_chunk(run_dir / last / MEGATRON_DIR, chunk)
            assert torch.equal(value, read_chunk(expected / last / MEGATRON_DIR, other)), key
    for file in (expected / "export").iterdir():
        assert (run_dir / "export" / file.name).read_bytes() == file.read_bytes()
    for file in sorted((expected / "validation").rglob("*.json*")):
        assert (run_dir / file.relative_to(expected)).read_text() == file.read_text()
    assert len(list(run_dir.rglob("validation/step_*"))) == NUM_STEPS // VALIDATION_STEPS + 1
    hidden = [path.name for path in (*run_dir.iterdir(), *(run_dir / "checkpoints").iterdir())]
    assert [name for name in hidden if name.startswith(".")] == [".lock"]


def test_run_that_is_killed_repeatedly_ends_bitwise_identical(folder: Path) -> None:
    chance = random.Random(NUM_KILLS)
    config = _config(folder, "killed")
    kills = {"starting": 0, "training": 0, "validating": 0, "saving": 0}
    while sum(kills.values()) < NUM_KILLS:
        command = Command(config)
        moment = chance.choice(["starting", "training", "validating", "validating", "saving", "saving"])
        if moment == "starting":
            time.sleep(chance.uniform(0, 3))
        else:
            command.until_steps(command.until_started() + chance.randint(1, 3))
            if moment == "validating":
                command.until_validating()
                time.sleep(chance.uniform(0, 0.03))
            elif moment == "saving":
                command.until_saving()
                time.sleep(chance.uniform(0, 0.03))
            else:
                time.sleep(chance.uniform(0, 0.5))
        command.process.kill()  # only the main process: its workers have to notice
        if command.end() == 0:
            break
        kills[moment] += 1
    starts = [json.loads(row)["step"] for row in (config.train.run_dir / "starts.jsonl").read_text().splitlines()]
    print(f"kills: {kills}; resumed from steps {starts}")
    assert sum(kills.values()) > NUM_KILLS // 2
    assert Command(config).end() == 0
    _assert_same(config.train.run_dir, folder / "undisturbed")


def _train(config: RunConfig) -> int:
    mesh.initialize(config.parallel)
    return train_in_world(config, ModelConfig.from_pretrained(config.model.path))


def test_run_stopped_by_signals_resumes_in_the_same_and_in_another_layout(folder: Path, gloo_pool: GlooPool) -> None:
    config = _config(folder, "signalled")
    for number in (signal.SIGUSR1, signal.SIGTERM):
        command = Command(config)
        first = command.until_started() + 1  # before its first step, a signal would end the process at once
        command.until_steps(first)
        os.killpg(command.process.pid, number)  # the whole process group, as a scheduler does
        assert command.end() == 85
        (*_, newest) = saved_steps(config.train.run_dir / "checkpoints")
        assert first <= newest == len(_steps(config.train.run_dir)) < NUM_STEPS
    elsewhere = _config(folder, "elsewhere", num_workers=0, tensor=2, pipeline=2)
    shutil.copytree(config.train.run_dir, elsewhere.train.run_dir)
    assert Command(config).end() == 0
    _assert_same(config.train.run_dir, folder / "undisturbed")
    assert gloo_pool.run(_train, elsewhere) == [0] * 4
    alone = _metrics(folder / "undisturbed")
    for mine, expected in zip(_metrics(elsewhere.train.run_dir), alone, strict=True):
        for name in ("step", "loss", "grad_norm", "lr", "kl", "reward/total", "response_tokens/mean"):
            if name not in expected:
                continue  # a validation
            assert mine[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), (mine["step"], name)
