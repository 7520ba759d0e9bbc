"""SFT steps in one process: metrics, unreadable videos and missing reasoning."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.video_language_model import VideoLanguageModel
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.engine import GenerationRequest, SamplingParams
from megatron_vcr1.training import train as train_module
from megatron_vcr1.training.metrics import Metrics
from megatron_vcr1.training.train import build, read_inputs_of_rank, train
from megatron_vcr1.types import RolloutGroup
from tests.training import workspace


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.create(tmp_path_factory.mktemp("sft"), num_videos=6)


def _config(folder: Path, run_dir: Path, *, train: dict[str, Any] | None = None, **data: Any) -> RunConfig:
    keys = {"run_dir": run_dir, "num_steps": 1, "prompts_per_step": 2, **(train or {})}
    return workspace.config(folder, "sft", train=keys, data=data)


def test_downscaled_videos_are_counted(folder: Path, tmp_path: Path) -> None:
    for max_prompt_tokens, num_downscaled in ((60, 2), (4096, 0)):
        run_dir = tmp_path / str(max_prompt_tokens)
        config = _config(folder, run_dir, total_pixels=64 * 28 * 28, max_prompt_tokens=max_prompt_tokens)
        assert train(config) == 0
        assert [row["downscaled_videos"] for row in workspace.metrics(run_dir)] == [num_downscaled]


def test_unreadable_videos_are_replaced_and_listed(folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["video"] = str(folder / "data" / row["video"])
    rows[0]["video"] = "nowhere.mp4"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [{"manifest": tmp_path / "train.jsonl", "thinking": False}]
    config = _config(folder, tmp_path / "run", train={"num_steps": None, "num_epochs": 2}, sources=sources)
    assert train(config) == 0
    skipped = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert {row["id"] for row in skipped} == {rows[0]["id"]} and "nowhere.mp4" in skipped[0]["reason"]
    metrics = workspace.metrics(tmp_path / "run")
    assert len(metrics) == -(-2 * len(rows) // 2)
    assert sum(row["skipped_samples"] for row in metrics) == len(skipped) >= 2


class _Servers:
    """Stands for colocated servers: records how much memory the gradient buffers have when it is called."""

    policy_version = 0

    def __init__(self, model: VideoLanguageModel) -> None:
        self.calls: list[tuple[str, int]] = []
        self._model = model

    def _gradient_bytes(self) -> int:
        return sum(parameter.main_grad.untyped_storage().nbytes() for parameter in self._model.parameters())

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[RolloutGroup]:
        assert not requests
        self.calls.append(("generate", self._gradient_bytes()))
        return []

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.calls.append(("update_weights", self._gradient_bytes()))

    def close(self) -> None:
        pass


def test_colocated_servers_have_the_memory_of_the_gradients_and_training_has_theirs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Servers release their memory at the end of `generate`, also in a run that resumes far from a validation."""
    monkeypatch.setattr(train_module, "build_engine", lambda config, model, *_: _Servers(model))
    benchmark = {"name": "temporal_grounding", "manifest": folder / "data" / "train.jsonl"}
    servers = {"rollout": {"engine": "sglang"}, "validation": {"benchmarks": [benchmark]}}
    results = []
    with mesh.world(ParallelSection()):
        for sections in (servers, {}):
            config = workspace.config(folder, "sft", **sections)
            inputs = read_inputs_of_rank(config, ModelConfig.from_pretrained(config.model.path))
            _, trainer = build(config, inputs)
            steps = [trainer.step(1, Metrics())]
            if sections:
                engine = trainer.engine_with_policy()
                assert isinstance(engine, _Servers)
                assert engine.calls == [("generate", 0), ("update_weights", 0)]
            results.append([*steps, trainer.step(2, Metrics())])
            trainer.close()
    assert results[0] == results[1]


def test_prompts_that_ask_for_reasoning_need_samples_with_reasoning(folder: Path, tmp_path: Path) -> None:
    sources = [{"manifest": folder / "data" / "train.jsonl", "thinking": True}]
    with pytest.raises(UserError, match=r"6 of 6 samples have no 'thinking'.*Set thinking = false"):
        train(_config(folder, tmp_path / "run", sources=sources))
