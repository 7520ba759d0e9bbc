"""`vcr1 config --check` and `vcr1 plan` agree with `vcr1 train` on what they refuse, at any size of the job."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_vcr1.checkpoint.torch_dist import read_metadata
from megatron_vcr1.cli.main import main
from megatron_vcr1.config.rendering import render_toml
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.manifest import read_manifest, write_manifest
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.planning.devices import DEVICES, Cluster, Device
from megatron_vcr1.planning.memory import checkpoint_bytes, training_memory
from megatron_vcr1.planning.run_job import job_of_run, layout_of_run
from megatron_vcr1.training import train as train_module
from megatron_vcr1.training.config_check import check_config
from tests.training import workspace

CLUSTER = Cluster(DEVICES["h100"], 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.create(tmp_path_factory.mktemp("check"), num_videos=6)


class Accepted(Exception):
    """Raised where `vcr1 train` would load the model."""


def _refusal_of_train(config: RunConfig, num_ranks: int) -> str | None:
    """Run `vcr1 train` up to the point where it loads the model, as rank 0 of a job of `num_ranks` ranks."""
    names = ("RunStore", "run_on_first_rank", "warn_if_shared_memory_is_small", "disable_nccl_cumem")
    patches = [mock.patch.object(train_module, name) for name in names]
    patches += [
        mock.patch.object(train_module.mesh, "launched_world_size", return_value=num_ranks),
        mock.patch.object(train_module.mesh, "world", return_value=nullcontext()),
        mock.patch.object(train_module.mesh, "replica_index", return_value=0),
        mock.patch.object(train_module.mesh, "is_first_rank_on_host", return_value=False),
        mock.patch.object(train_module.dist, "get_world_size", return_value=num_ranks),
        mock.patch.object(train_module, "build_model", side_effect=Accepted),
    ]
    for patch in patches:
        patch.start()
    try:
        train_module.train(config)
    except Accepted:
        return None
    except UserError as error:
        return str(error)
    finally:
        for patch in patches:
            patch.stop()
    raise AssertionError("train neither refused the settings nor loaded the model")


# Ranks, [parallel], [recompute], prompts per step, minibatches, and whether it is possible. The model has 4 layers,
# 4 heads, 2 key-value heads and an FFN of 352.
FULL = {"granularity": "full"}
LAYOUTS: list[tuple[int, dict[str, Any], dict[str, Any], int, int, bool]] = [
    (1, {}, {}, 4, 1, True),
    (2, {}, {}, 4, 1, True),
    (3, {}, {}, 4, 1, False),  # prompts
    (3, {}, {}, 6, 1, True),
    (4, {}, {}, 4, 3, False),  # minibatches
    (4, {}, {}, 6, 3, False),  # prompts
    (4, {}, {}, 12, 3, True),
    (8, {}, {}, 4, 1, False),
    (8, {}, {}, 8, 4, True),
    (2, {"tensor": 2}, {}, 4, 1, True),
    (3, {"tensor": 2}, {}, 6, 1, False),  # ranks
    (4, {"tensor": 2}, {}, 3, 1, False),
    (4, {"tensor": 2, "sequence_parallel": True}, {}, 4, 2, True),
    (4, {"tensor": 4}, {}, 1, 1, True),
    (3, {"tensor": 3}, {}, 3, 1, False),  # heads
    (8, {"tensor": 8}, {}, 8, 1, False),
    (32, {"tensor": 4}, {}, 8, 1, True),
    (32, {"tensor": 4}, {}, 12, 1, False),
    (2, {"pipeline": 2}, {}, 1, 1, True),
    (4, {"pipeline": 4}, {}, 1, 1, True),
    (3, {"pipeline": 3}, {}, 3, 1, False),  # layers
    (3, {"pipeline": 3, "first_stage_layers": 2}, {}, 1, 1, True),
    (3, {"pipeline": 3, "last_stage_layers": 3}, {}, 1, 1, False),
    (5, {"pipeline": 5}, {}, 5, 1, False),
    (1, {"first_stage_layers": 2}, {}, 1, 1, False),
    (8, {"tensor": 2, "pipeline": 2}, {}, 2, 1, True),
    (8, {"tensor": 2, "pipeline": 2}, {}, 3, 1, False),
    (2, {"pipeline": 2}, {**FULL, "num_layers": 2}, 2, 1, True),
    (2, {"pipeline": 2}, {**FULL, "num_layers": 3}, 2, 1, False),
    (2, {"pipeline": 2, "first_stage_layers": 1}, {**FULL, "num_layers": 3}, 2, 1, False),
    (4, {"context": 2}, {}, 4, 1, True),
    (8, {"tensor": 2, "context": 2, "sequence_parallel": True}, {}, 4, 1, True),
    (6, {"tensor": 2, "context": 2}, {}, 6, 1, False),  # ranks
    (8, {"context": 2, "pipeline": 2}, {}, 3, 1, False),  # prompts
]


def _config(folder: Path, **sections: Any) -> RunConfig:
    train = {"run_dir": folder / "run", **sections.pop("train", {})}
    return workspace.config(folder, "grpo", train=train, **sections)


def test_layouts_are_accepted_or_refused_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(LAYOUTS) >= 34
    for num_ranks, parallel, recompute, prompts, minibatches, is_possible in LAYOUTS:
        config = _config(
            folder,
            parallel=parallel,
            recompute=recompute,
            train={"prompts_per_step": prompts},
            grpo={"num_minibatches": minibatches},
        )
        refusal = _refusal_of_train(config, num_ranks)
        findings = check_config(config, Cluster(DEVICES["h100"], num_ranks))
        errors = [finding.text for finding in findings if finding.status == "error"]
        assert errors == ([] if refusal is None else [refusal]), (num_ranks, parallel, prompts)
        assert (refusal is None) == is_possible, (num_ranks, parallel, prompts, refusal)
        job = job_of_run(config, ModelConfig.from_pretrained(config.model.path), response_tokens=8)
        try:
            layout = layout_of_run(config, job, num_ranks)
        except UserError as error:
            assert str(error) == refusal
        else:
            assert refusal is None and layout.num_gpus == num_ranks


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"path": "nowhere"}},
        {"data": {"sources": []}},
        {"data": {"sources": [{"manifest": "nowhere.jsonl"}]}},
        {"data": {"templates": "nowhere.toml"}},
        {"data": {"backend": "dali-gpu", "num_workers": 1}},
        {"optimizer": {"warmup_steps": 2}},
        {"grpo": {"one_step_off": True}},
        {"grpo": {"overlong_buffer_tokens": 9}},
        {"profile": {"enabled": True, "ranks": [4]}},
        {"checkpoint": {"keep_best": "a/b"}},
        {"validation": {"benchmarks": [{"name": "no_benchmark", "manifest": "nowhere.jsonl"}]}},
    ],
    ids=str,
)
def test_other_mistakes_are_refused_with_the_words_of_train(folder: Path, sections: dict[str, Any]) -> None:
    config = _config(folder, **sections)
    refusal = _refusal_of_train(config, CLUSTER.num_gpus)
    assert refusal is not None
    assert refusal in [finding.text for finding in check_config(config, CLUSTER) if finding.status == "error"]


def test_a_good_configuration_is_summarized_in_a_table(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = {"name": "temporal_grounding", "manifest": folder / "data" / "train.jsonl", "thinking": False}
    config = _config(folder, validation={"benchmarks": [benchmark]})
    (tmp_path / "run.toml").write_text(render_toml(config, documented=False))
    assert main(["config", "--check", str(tmp_path / "run.toml"), "--ranks", "4", "--gpu", "h200"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for part in ("1 x 4 replicas", "4 prompts per step", "6 samples", "temporal_grounding/mIoU", "4 of 4 read", "H200"):
        assert part in printed, printed
    assert not (folder / "run").exists()  # a check writes nothing
    assert main(["config", "--check", str(tmp_path / "run.toml"), "--ranks", "3"]) == 2
    assert "error" in capsys.readouterr().out
    assert main(["config", "--ranks", "3"]) == 2


def _finding(config: RunConfig, subject: str, cluster: Cluster = CLUSTER) -> tuple[str, str]:
    (finding,) = [finding for finding in check_config(config, cluster) if finding.subject == subject]
    return finding.status, finding.text


def test_unreadable_samples_are_named(folder: Path, tmp_path: Path) -> None:
    samples = read_manifest(folder / "data" / "train.jsonl")
    manifest = tmp_path / "broken.jsonl"
    write_manifest(manifest, samples)
    manifest.write_text(manifest.read_text().replace(str(samples[0].media[0].path), str(tmp_path / "missing.mp4")))
    config = _config(folder, data={"sources": [{"manifest": manifest, "thinking": False}]})
    status, text = _finding(config, "first samples")
    assert status == "warning" and "1 of 2 read" in text and f"{samples[0].id} would be skipped" in text
    status, text = _finding(_config(folder, data={"max_prompt_tokens": 8}), "first samples")
    assert status == "warning" and text.count("would be skipped") == 2


def test_ignored_epochs_are_noticed(folder: Path) -> None:
    status, text = _finding(_config(folder, train={"num_steps": 3, "num_epochs": 2.0}), "settings, data")
    assert status == "warning" and "3 steps; train.num_epochs = 2 has no effect" in text


def test_prompts_whose_responses_would_leave_the_range_of_positions_are_named(folder: Path) -> None:
    benchmark = {"name": "temporal_grounding", "manifest": folder / "data" / "train.jsonl", "thinking": False}
    config = _config(folder, rollout={"max_new_tokens": 512}, validation={"benchmarks": [benchmark]})
    status, text = _finding(config, "first samples")
    assert status == "warning" and "2 of 4 read" in text and text.count("its rotary positions reach") == 2


def test_parallel_groups_that_cross_nodes_are_noticed(folder: Path) -> None:
    for context, expected in ((2, "ok"), (4, "warning")):
        layout = {"tensor": 4, "context": context, "sequence_parallel": True}
        status, text = _finding(_config(folder, parallel=layout), "model, layout", Cluster(DEVICES["h100"], 16))
        assert status == expected and ("context-parallel groups cross nodes of 8 GPUs" in text) == (context == 4)


def test_memory_disk_servers_and_the_other_stage_are_noticed(folder: Path, tmp_path: Path) -> None:
    small = Cluster(Device("tiny GPU", 1e9, 1.0, 1.0, 1.0, 1.0), 4)
    status, text = _finding(_config(folder), "memory", small)
    assert status == "warning" and "too much" in text
    assert text.count("in the host memory of a node") == 1
    with mock.patch("shutil.disk_usage", return_value=mock.Mock(free=1000)):
        assert _finding(_config(folder), "checkpoints")[0] == "error"
    servers = {"rollout": {"engine": "sglang"}, "sglang": {"num_servers": 4, "python": tmp_path / "python"}}
    assert "cannot be run" in _finding(_config(folder, **servers), "servers")[1]
    shared = {**servers, "sglang": {"num_servers": 2}}
    assert "4 replicas share 2 servers" in _finding(_config(folder, **shared), "servers")[1]
    (tmp_path / "file").write_text("")
    assert (
        "cannot be written to"
        in _finding(_config(folder, train={"run_dir": tmp_path / "file/run"}), "run directory")[1]
    )


def test_servers_of_a_validation_share_the_memory_of_sft(folder: Path) -> None:
    manifest = folder / "data" / "train.jsonl"
    config = _config(
        folder,
        train={"stage": "sft"},
        rollout={"engine": "sglang", "max_new_tokens": 8},
        sglang={"memory_fraction": 0.5},
        validation={"benchmarks": [{"name": "temporal_grounding", "manifest": manifest}]},
    )
    job = job_of_run(config, ModelConfig.from_pretrained(config.model.path), response_tokens=8)
    (memory,) = training_memory(job, layout_of_run(config, job, 1), DEVICES["h100"])
    for factor, expected in ((2.1, "ok"), (1.9, "warning")):
        device = dataclasses.replace(DEVICES["h100"], memory_bytes=factor * memory.resident)
        status, text = _finding(config, "memory", Cluster(device, 1))
        assert status == expected and ("lower sglang.memory_fraction" in text) == (expected == "warning")


def test_size_of_a_checkpoint_is_predicted_and_a_finished_run_is_found(folder: Path, tmp_path: Path) -> None:
    config = _config(folder, train={"run_dir": tmp_path, "num_steps": 1}, grpo={"group_size": 2})
    assert train_module.train(config) == 0
    job = job_of_run(config, ModelConfig.from_pretrained(config.model.path), response_tokens=8)
    tensors = read_metadata(tmp_path / "checkpoints" / "step_1" / "megatron")
    stored = (tmp_path / "checkpoints" / "step_1" / "megatron").glob("*.distcp")
    assert tensors and checkpoint_bytes(job) == pytest.approx(sum(file.stat().st_size for file in stored), rel=0.1)
    assert _finding(config, "run directory") == ("ok", f"{tmp_path}: resumes from step 1")
    other = config.model_copy(update={"train": config.train.model_copy(update={"stage": "sft"})})
    assert _finding(other, "run directory")[0] == "error"
