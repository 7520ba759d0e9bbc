"""Validation during training: equal to `vcr1 evaluate`, resumable, and the source of the best checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.checkpoint.step_dirs import saved_steps
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.manifest import read_manifest, write_manifest
from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation.evaluate import evaluate_model
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.local.engine import LocalEngine
from megatron_vcr1.training.lifecycle import EXIT_STOPPED_BY_SIGNAL
from megatron_vcr1.training.train import train, train_in_world
from megatron_vcr1.training.validation import BestStep, ValidationResult, Validator
from tests.gloo import GlooPool
from tests.training import workspace

pytestmark = pytest.mark.xdist_group("gloo")

TASKS = ("temporal_grounding", "multiple_choice_qa")
LABELS = ("grounding", "choices")
TIMED = ("time/", "tokens_per_s", "tflops_per_s", "memory/")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose training data are four readable samples, and whose validation data include a damaged video."""
    folder = workspace.create(tmp_path_factory.mktemp("validation"), tasks=TASKS, num_videos=12)
    samples = read_manifest(folder / "data" / "train.jsonl")
    write_manifest(folder / "data" / "validation.jsonl", samples[:8])
    write_manifest(folder / "data" / "train.jsonl", samples[8:])
    damaged = samples[0].video.path
    assert isinstance(damaged, str)
    Path(damaged).write_bytes(b"no video")
    return folder


def _config(folder: Path, run_dir: Path, stage: str = "grpo", **sections: Any) -> RunConfig:
    manifest = folder / "data" / "validation.jsonl"
    benchmarks = [
        {"name": task, "label": label, "manifest": manifest, "thinking": False}
        for task, label in zip(TASKS, LABELS, strict=True)
    ]
    keys = {"benchmarks": benchmarks, "every_steps": 1, "max_new_tokens": 6, "prompts_per_batch": 2}
    source = {"manifest": folder / "data" / "train.jsonl", "thinking": False}
    tables: dict[str, dict[str, Any]] = {
        "data": {"sources": [{**source, "rewards": ["tests.training.own_rewards:variety"]}]},
        "optimizer": {"learning_rate": 1e-2},
        "train": {"run_dir": run_dir, "num_steps": 2, "prompts_per_step": 4},
        "evaluate": {name: value for name, value in keys.items() if name != "every_steps"},
        "grpo": {"group_size": 2},
        "validation": keys,
    }
    return workspace.config(
        folder, stage, **{name: {**tables.get(name, {}), **sections.get(name, {})} for name in {**tables, **sections}}
    )


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def _curves(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the steps and those of the validations, without times."""
    rows = [
        {name: value for name, value in row.items() if not name.startswith(TIMED)} for row in workspace.metrics(run_dir)
    ]
    validations = [row for row in rows if "loss" not in row]
    return [row for row in rows if "loss" in row], validations


def _predictions(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The predictions and the samples' metrics of each benchmark in a folder of results."""
    found = {}
    for label in LABELS:
        for name in ("predictions.jsonl", "samples.jsonl"):
            rows = _rows(folder / label / name)
            found[f"{label}/{name}"] = [{key: row[key] for key in row if key != "prompt_digest"} for row in rows]
    return found


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """A finished GRPO run in one process that validated and exported the initial model and every step."""
    config = _config(folder, folder / "alone", checkpoint={"export": "always", "every_steps": 1})
    assert train(config) == 0
    return config.train.run_dir


def test_validation_equals_evaluation_of_the_exported_weights_sample_by_sample(folder: Path, alone: Path) -> None:
    models = {0: folder / "model", 1: alone / "export" / "step_1", 2: alone / "export" / "step_2"}
    _, validations = _curves(alone)
    for step, model in models.items():
        config = _config(folder, folder / f"evaluated_{step}", model={"path": model})
        results = evaluate_model(config)
        expected = _predictions(config.train.run_dir / "evaluation")
        assert _predictions(alone / "validation" / f"step_{step}") == expected
        (row,) = [row for row in validations if row["step"] == step]
        for result in results:
            label = LABELS[TASKS.index(result.benchmark.task)]
            for name, estimate in result.summary.metrics.items():
                assert row[f"validation/{label}/{name}"] == estimate.value
    texts = {json.dumps(_predictions(alone / "validation" / f"step_{step}")) for step in models}
    assert len(texts) == 3  # the weights differ, and so do the answers


def test_damaged_video_costs_its_sample_only_and_is_listed(folder: Path, alone: Path) -> None:
    damaged = read_manifest(folder / "data" / "validation.jsonl")[0]
    label = LABELS[TASKS.index(damaged.task)]
    _, validations = _curves(alone)
    assert [row[f"validation/{label}/num_unanswered"] for row in validations] == [1, 1, 1]
    listed = _rows(alone / "skipped.jsonl")
    assert [(row["step"], row["validation"], row["id"]) for row in listed] == [
        (n, label, damaged.id) for n in (0, 1, 2)
    ]
    assert all(row["reason"] for row in listed)


def test_validation_changes_nothing_in_training(folder: Path, alone: Path) -> None:
    config = _config(folder, folder / "without", validation={"benchmarks": []})
    assert train(config) == 0
    steps, validations = _curves(config.train.run_dir)
    assert validations == [] and steps == _curves(alone)[0]


@pytest.mark.parametrize(("stage", "parallel"), [("grpo", {"tensor": 2, "context": 2}), ("sft", {"pipeline": 2})])
def test_all_layouts_validate_with_the_same_responses(
    folder: Path, gloo_pool: GlooPool, stage: str, parallel: dict[str, int]
) -> None:
    alone = _config(folder, folder / f"{stage}-one", stage, train={"num_steps": 1})
    assert train(alone) == 0
    config = _config(folder, folder / f"{stage}-four", stage, train={"num_steps": 1}, parallel=parallel)
    assert gloo_pool.run(_train, config) == [0] * 4
    for step in (0, 1):
        mine, expected = (_predictions(run.train.run_dir / f"validation/step_{step}") for run in (config, alone))
        assert mine == expected
    assert _curves(config.train.run_dir)[1] == _curves(alone.train.run_dir)[1]


def _train(config: RunConfig) -> int:
    mesh.initialize(config.parallel)
    return train_in_world(config, ModelConfig.from_pretrained(config.model.path))


def test_validation_that_a_signal_interrupts_is_repeated_by_the_next_start(
    folder: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, calls = LocalEngine.generate, []

    def signalled(self: LocalEngine, *args: Any) -> Any:
        calls.append(args)
        # The first start ends in the first batch. In the next one, four batches validate the initial model, one trains,
        # and the next one validates.
        if len(calls) in (1, 7):
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(self, *args)

    monkeypatch.setattr(LocalEngine, "generate", signalled)
    config = _config(folder, tmp_path / "run", checkpoint={"export": "always", "every_steps": 1})
    assert train(config) == EXIT_STOPPED_BY_SIGNAL
    assert len(calls) == 1 and not saved_steps(tmp_path / "run" / "checkpoints")  # no step follows
    assert train(config) == EXIT_STOPPED_BY_SIGNAL
    assert [row["step"] for row in _curves(tmp_path / "run")[1]] == [0]
    monkeypatch.undo()
    assert train(config) == 0
    assert _curves(tmp_path / "run") == _curves(alone)
    for step in (0, 1, 2):
        assert _predictions(tmp_path / f"run/validation/step_{step}") == _predictions(alone / f"validation/step_{step}")


def _scripted(values: Mapping[int, float], seen: list[int]) -> Any:
    """A stand-in for `Validator.run` with a given metric at each step."""

    def run(self: Validator, engine: Any, step: int, **_: Any) -> ValidationResult:
        seen.append(step)
        return ValidationResult({"grounding/mIoU": values[step]}, (), ())

    return run


def test_best_checkpoint_survives_the_rotation_and_is_exported_and_training_stops_early(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[int] = []
    values = {0: 0.9, 1: 0.1, 2: 0.5, 3: 0.2, 4: 0.5, 5: 0.3}
    monkeypatch.setattr(Validator, "run", _scripted(values, seen))
    keys: dict[str, Any] = {
        "train": {"run_dir": tmp_path / "run", "num_steps": 9, "prompts_per_step": 2},
        "validation": {"patience": 3},
        "checkpoint": {"keep_best": "grounding/mIoU", "every_steps": 4, "keep_last": 1, "export": "best"},
    }
    config = _config(folder, tmp_path / "run", "sft", **keys)
    with caplog.at_level("INFO"):
        assert train(config) == 0
    assert seen == [0, 1, 2, 3, 4, 5]  # the initial model has no checkpoint, so it is not the best
    assert saved_steps(tmp_path / "run" / "checkpoints") == [2, 5]
    assert json.loads((tmp_path / "run" / "exported.json").read_text())["step"] == 2
    assert "early stop: 3 validations in a row without a better grounding/mIoU" in caplog.text
    assert train(config) == 0 and seen == [0, 1, 2, 3, 4, 5]  # a stopped run stays stopped
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_2")
    with caplog.at_level("INFO"):
        assert (
            train(_config(folder, tmp_path / "run", "sft", **{**keys, "train": {**keys["train"], "num_steps": 5}})) == 0
        )
    assert "the best checkpoint, of step 2, is gone" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": {"keep_best": "grounding/nothing"}}, r"no such metric; it can be grounding/mIoU"),
        ({"checkpoint": {"keep_best": "a/b"}, "validation": {"benchmarks": []}}, r"needs validation"),
        ({"checkpoint": {"export": "best"}}, r"export = 'best' needs checkpoint\.keep_best"),
        ({"validation": {"patience": 2}}, r"patience needs checkpoint\.keep_best"),
    ],
)
def test_settings_that_need_a_metric_are_refused_without_it(
    folder: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(_config(folder, tmp_path / "run", **settings))


def test_best_step_ignores_missing_values_and_continues_from_its_state() -> None:
    best = BestStep("grounding/mIoU")
    assert best.update(5, 0.2) and not best.update(10, None) and not best.update(15, 0.2)
    again = BestStep("grounding/mIoU")
    again.load_state_dict(json.loads(json.dumps(best.state_dict())))
    assert (again.step, again.value, again.num_worse) == (5, 0.2, 1)
    assert again.update(20, 0.3) and again.num_worse == 0


def test_best_step_of_another_metric_is_not_continued(caplog: pytest.LogCaptureFixture) -> None:
    best = BestStep("grounding/mIoU")
    best.update(5, 0.6)
    other = BestStep("choices/accuracy")
    other.load_state_dict(best.state_dict())
    assert "checkpoint.keep_best was grounding/mIoU: the best step starts over" in caplog.text
    assert other.step is None and other.update(10, 0.4)
