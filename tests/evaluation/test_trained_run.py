from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.config.rendering import render_toml
from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation.trained_run import evaluation_config, open_run, trained_tasks
from tests.data.manifest_rows import ROWS
from tests.training import workspace


def make_run(folder: Path, *sources: dict[str, Any], steps: tuple[int, ...] = (), exported: int | None = None) -> Path:
    """Make the files of a run that an evaluation reads, without weights."""
    manifest = folder / "train.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]))
    (folder / "templates.toml").write_text(workspace.TEMPLATES)
    data = {"sources": [{"manifest": manifest} | source for source in sources or ({"thinking": False},)]}
    config = workspace.config(folder, "sft", data=data, train={"run_dir": folder / "run"})
    (folder / "run/checkpoints").mkdir(parents=True)
    (folder / "run/config.toml").write_text(render_toml(config, documented=False))
    for step in steps:
        (folder / f"run/checkpoints/step_{step}").mkdir()
    if exported is not None:
        (folder / "run/export").mkdir()
        (folder / "run/exported.json").write_text(json.dumps({"step": exported, "directory": "export"}))
    return folder / "run"


@pytest.mark.parametrize(
    ("steps", "exported", "model"),
    [
        ((2, 10), 10, "export"),
        ((2, 10), None, "checkpoints/step_10"),
        ((2, 10), 2, "checkpoints/step_10"),  # training went on after the export
        ((), 4, "export"),
    ],
)
def test_the_newest_weights_are_taken(tmp_path: Path, steps: tuple[int, ...], exported: int | None, model: str) -> None:
    run_dir = make_run(tmp_path, steps=steps, exported=exported)
    assert open_run(run_dir).model == run_dir / model


def test_a_run_without_weights_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither an export nor a checkpoint yet"):
        open_run(make_run(tmp_path))
    with pytest.raises(UserError, match=r"no config.toml in it"):
        open_run(tmp_path)


def test_a_manifest_is_evaluated_with_the_settings_of_the_training(tmp_path: Path) -> None:
    run = open_run(make_run(tmp_path, steps=(3,)))
    config = evaluation_config(run, None, [tmp_path / "train.jsonl"], ["--evaluate.max_new_tokens", "7"])
    assert config.model.path == run.model and config.model.dtype == "float32"
    assert config.data == run.config.data
    assert (config.train.run_dir, config.evaluate.max_new_tokens) == (run.path, 7)
    sources = config.evaluate.benchmarks
    assert [source.name for source in sources] == ["temporal_grounding", "tracking", "grounded_qa"]
    assert [source.label for source in sources] == ["train_temporal_grounding", "train_tracking", "train_grounded_qa"]
    assert not any(source.thinking for source in sources)
    assert trained_tasks(run) == ["temporal_grounding", "tracking", "grounded_qa"]
    with pytest.raises(UserError, match="nothing to evaluate; name test data with --manifest"):
        evaluation_config(run, None, [], [])


def test_benchmarks_of_a_file_are_evaluated_with_the_settings_of_the_training(tmp_path: Path) -> None:
    run = open_run(make_run(tmp_path, steps=(3,)))
    file = tmp_path / "evaluate.toml"
    file.write_text(
        '[model]\npath = "elsewhere"\n[data]\nfps = 9.0\n[train]\nstage = "grpo"\n[evaluate]\nmax_new_tokens = 5\n'
        '[[evaluate.benchmarks]]\nname = "nextgqa"\nmanifest = "a.jsonl"\n'
        '[[evaluate.benchmarks]]\nname = "mvbench"\nmanifest = "b.jsonl"\nthinking = true\n'
    )
    config = evaluation_config(run, file, [], [])
    assert config.model.path == run.model and config.data == run.config.data
    assert config.evaluate.max_new_tokens == 5
    assert [source.thinking for source in config.evaluate.benchmarks] == [False, True]  # its own setting is kept


def test_a_run_that_was_trained_both_ways_needs_a_choice(tmp_path: Path) -> None:
    run = open_run(make_run(tmp_path, {"thinking": True}, {"thinking": False}, steps=(3,)))
    manifests = [tmp_path / "train.jsonl"]
    with pytest.raises(UserError, match="some sources with thinking and on others without; choose with --evaluate"):
        evaluation_config(run, None, manifests, [])
    config = evaluation_config(run, None, manifests, ["--evaluate.thinking", "true"])
    assert all(source.thinking for source in config.evaluate.benchmarks)
