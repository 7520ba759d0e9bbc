"""One step off, with an engine that has its own copy of the weights, like a server."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from megatron_vcr1 import timeline
from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.manifest import read_manifest, write_manifest
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.cpu.cuda_emulation import CudaMeansCpu
from megatron_vcr1.model.video_language_model import VideoLanguageModel, build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.engine import EngineError, GenerationRequest, SamplingParams, WeightsNeeded
from megatron_vcr1.rollout.local.engine import LocalEngine
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from megatron_vcr1.training import train as train_module
from megatron_vcr1.training.grpo.one_step_off import OneStepOffSource
from megatron_vcr1.training.grpo.trainer import GrpoTrainer
from megatron_vcr1.training.metrics import Metrics
from megatron_vcr1.training.train import build, read_inputs_of_rank
from megatron_vcr1.types import RolloutGroup, Video
from tests.limits import HANG_S
from tests.training import workspace

NUM_STEPS = 3


class ServerLikeEngine:
    """The in-process engine on a second model, whose weights change only with a weight sync."""

    def __init__(self, config: RunConfig, folder: Path, processor: PromptProcessor) -> None:
        self._folder = folder
        self._model = build_model(
            ModelConfig.from_pretrained(config.model.path), config.model, config.parallel, config.recompute
        )
        load_model_weights(self._model, config.model.path)
        tokens = SpecialTokens.from_pretrained(config.model.path, processor, self._model.model_config.num_embeddings)
        decode = partial(processor.decode, skip_special_tokens=False)
        self._engine = LocalEngine(self._model, tokens, decode, max_batch_responses=64)
        self.fails = False

    @property
    def policy_version(self) -> int:
        return self._engine.policy_version

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[RolloutGroup]:
        if self.fails:
            raise EngineError("the server is gone")
        return self._engine.generate(requests, params)

    def sample(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[RolloutGroup]:
        with CudaMeansCpu():  # the emulation is per thread, and this is the rollout thread
            return self.generate(requests, params)

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        save_file({name: tensor.clone() for name, tensor in tensors}, self._folder / "model.safetensors")
        load_model_weights(self._model, self._folder)
        self._engine.update_weights((), version)

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = workspace.create(tmp_path_factory.mktemp("one_step_off"), num_videos=12)
    shutil.copytree(folder / "model", folder / "server")
    return folder


def _trainer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, one_step_off: bool, manifest: str = "train.jsonl"
) -> GrpoTrainer:
    source = {"manifest": folder / "data" / manifest, "thinking": False}
    source["rewards"] = ["tests.training.own_rewards:variety"]
    config = workspace.config(
        folder,
        "grpo",
        data={**workspace.config(folder, "grpo").data.model_dump(), "sources": [source]},
        grpo={"one_step_off": one_step_off},
        rollout={"engine": "sglang"},
        sglang={"colocated": False},
        train={"num_steps": NUM_STEPS},
        optimizer={"learning_rate": 1e-2},
    )

    def build_engine(
        config: RunConfig, model: VideoLanguageModel, processor: PromptProcessor, tokens: SpecialTokens
    ) -> ServerLikeEngine:
        return ServerLikeEngine(config, folder / "server", processor)

    monkeypatch.setattr(train_module, "build_engine", build_engine)
    _, trainer = build(config, read_inputs_of_rank(config, ModelConfig.from_pretrained(config.model.path)))
    assert isinstance(trainer, GrpoTrainer)
    return trainer


def _engine(trainer: GrpoTrainer) -> ServerLikeEngine:
    engine = trainer._source._engine
    assert isinstance(engine, ServerLikeEngine)
    return engine


def _run(trainer: GrpoTrainer) -> tuple[list[dict[str, float]], list[list[str]]]:
    rows, texts = [], []
    for step in range(1, NUM_STEPS + 1):
        result = trainer.step(step, metrics := Metrics())
        rows.append(metrics.reduce())
        texts.append([response["text"] for row in result.rollouts.values() for response in row["responses"]])
    return rows, texts


def test_steps_train_on_responses_of_the_previous_policy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mesh.world(ParallelSection()):
        rows, texts = _run(_trainer(folder, monkeypatch, one_step_off=False))
        trainer = _trainer(folder, monkeypatch, one_step_off=True)
        with timeline.recording() as spans:
            off_rows, off_texts = _run(trainer)
        state = trainer.state_dict()
        trainer.close()
    assert [row["policy_lag"] for row in rows] == [0, 0, 0]
    assert [row["policy_lag"] for row in off_rows] == [0, 1, 1]
    assert [row["policy_version"] for row in off_rows] == [0, 1, 2]
    assert all(row["mismatch/max_abs"] < 1e-4 for row in rows)  # the engine had the new weights in time
    assert off_rows[1]["mismatch/mean_abs"] > 1e-3  # the policy has changed since
    assert off_texts[0] == texts[0] and off_texts[1] != texts[1]
    assert [span.name for span in spans if span.track == "rollout_0"] == ["rollout"] * (NUM_STEPS - 1)
    assert state["policy_version"] == NUM_STEPS and state["prompts"]["next_position"] == 4 * NUM_STEPS


def test_resume_samples_the_prompts_in_progress_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mesh.world(ParallelSection()):
        trainer = _trainer(folder, monkeypatch, one_step_off=True)
        trainer.step(1, Metrics())
        state = trainer.state_dict()
        expected = trainer.step(2, Metrics()).samples
        trainer.close()
        resumed = _trainer(folder, monkeypatch, one_step_off=True)
        resumed.load_state_dict(state)
        assert resumed.step(2, Metrics()).samples == expected
        resumed.close()
    assert state["prompts"]["next_position"] == 4


def test_unreadable_sample_is_reported_once_and_again_after_a_resume(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = folder / "data" / "broken.jsonl"
    samples = read_manifest(folder / "data" / "train.jsonl")
    write_manifest(manifest, samples)
    with mesh.world(ParallelSection()):
        order = _trainer(folder, monkeypatch, one_step_off=True, manifest=manifest.name)._source._stream._order
        bad = order.sample_at(6).id  # belongs to step 2 but is drawn during step 1
        write_manifest(manifest, [replace(s, media=(Video("nowhere.mp4"),)) if s.id == bad else s for s in samples])
        trainer = _trainer(folder, monkeypatch, one_step_off=True, manifest=manifest.name)
        trainer.step(1, Metrics())
        assert trainer.take_skipped() == []
        state = trainer.state_dict()
        trainer.step(2, Metrics())
        skipped = trainer.take_skipped()
        trainer.close()
        assert bad in {sample.id for sample in skipped}
        resumed = _trainer(folder, monkeypatch, one_step_off=True, manifest=manifest.name)
        resumed.load_state_dict(state)
        resumed.step(2, Metrics())
        assert resumed.take_skipped() == skipped
        resumed.close()


def test_engine_error_in_the_thread_stops_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mesh.world(ParallelSection()):
        trainer = _trainer(folder, monkeypatch, one_step_off=True)
        engine = _engine(trainer)
        sample = engine.sample

        def fails(*args: object) -> list[RolloutGroup]:
            engine.fails = True
            return sample(*args)  # type: ignore[arg-type]

        engine.sample = fails  # type: ignore[method-assign]
        trainer.step(1, Metrics())
        with pytest.raises(EngineError, match="the server is gone"):
            trainer.step(2, Metrics())
        trainer.close()


def test_responses_that_were_lost_with_the_weights_are_sampled_synchronously(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mesh.world(ParallelSection()):
        trainer = _trainer(folder, monkeypatch, one_step_off=True)
        engine = _engine(trainer)
        sample, losses = engine.sample, iter([True])

        def sample_or_lose(*args: object) -> list[RolloutGroup]:
            if next(losses, False):
                raise WeightsNeeded("the server was started anew")
            return sample(*args)  # type: ignore[arg-type]

        engine.sample = sample_or_lose  # type: ignore[method-assign]
        rows, _ = _run(trainer)
        trainer.close()
    assert [row["policy_lag"] for row in rows] == [0, 0, 1]
    assert rows[1]["mismatch/max_abs"] < 1e-4  # sampled from the weights that the step trains


def test_close_aborts_sampling_in_progress(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(threading.enumerate())
    with mesh.world(ParallelSection()):
        trainer = _trainer(folder, monkeypatch, one_step_off=True)
        engine = _engine(trainer)
        aborted = threading.Event()

        def sample_until_aborted(*args: object) -> list[RolloutGroup]:
            assert aborted.wait(HANG_S)
            return []

        engine.sample = sample_until_aborted  # type: ignore[method-assign]
        engine.abort = aborted.set  # type: ignore[method-assign]
        trainer.step(1, Metrics())
        trainer.close()
    assert aborted.is_set()
    assert not any(thread.name.startswith("rollout") for thread in set(threading.enumerate()) - before)


def test_last_step_does_not_sample_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mesh.world(ParallelSection()):
        trainer = _trainer(folder, monkeypatch, one_step_off=True)
        source = trainer._source
        assert isinstance(source, OneStepOffSource)
        trainer.step(NUM_STEPS, Metrics())
        assert not source._is_sampling
        trainer.close()


def test_validation_between_steps_uses_the_present_policy_and_changes_no_response(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, versions = [], []
    for validates in (False, True):
        with mesh.world(ParallelSection()):
            trainer = _trainer(folder, monkeypatch, one_step_off=True)
            for step in (1, 2):
                result = trainer.step(step, Metrics())
                texts += [response["text"] for row in result.rollouts.values() for response in row["responses"]]
                if validates:
                    versions.append(trainer.engine_with_policy().policy_version)
            trainer.close()
    assert texts[: len(texts) // 2] == texts[len(texts) // 2 :]
    assert versions == [1, 2]  # sampling ahead used versions 0 and 1
