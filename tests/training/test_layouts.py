"""GRPO and SFT have the same losses, gradient norms and responses in every parallel layout."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vcr1.checkpoint.model_dir import MEGATRON_DIR
from megatron_vcr1.checkpoint.step_dirs import saved_steps
from megatron_vcr1.checkpoint.torch_dist import read_chunk, read_metadata
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.model import context_attention
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.parallel import mesh
from megatron_vcr1.training.train import train, train_in_world
from tests.gloo import GlooPool, RankFailure
from tests.training import workspace
from tests.training.late_parameters import late_parameters

pytestmark = pytest.mark.xdist_group("gloo")

TOLERANCE = 1e-5
RARE_REWARD = "tests.training.own_rewards:starts_early"
NUM_STEPS = 2

# Gradients are reduced during the backward pass from the second step on.
OVERLAP = {"learning_rate": 1e-4, "overlap_grad_reduce": True}
OVERLAP_BOTH = {**OVERLAP, "overlap_param_gather": True}
# Layouts of four ranks. Ranks that a layout does not need for one replica hold further replicas (data parallel).
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "dp4": {},
    "dp4-whole-optimizer": {"optimizer": {"learning_rate": 1e-4, "distributed": False}},
    "tp2-dp2": {"parallel": {"tensor": 2}},
    "pp2-dp2": {"parallel": {"pipeline": 2}},
    "tp2-pp2": {"parallel": {"tensor": 2, "pipeline": 2}},
    "tp2-pp2-sp-recompute": {
        "parallel": {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
        "recompute": {"granularity": "full", "offload": True},
    },
    "cp2-dp2": {"parallel": {"context": 2}},
    "cp2-tp2-sp-vision-data-overlap": {
        "parallel": {"context": 2, "tensor": 2, "sequence_parallel": True, "vision": "data"},
        "optimizer": OVERLAP,
    },
    "cp2-pp2-recompute-overlap": {
        "parallel": {"context": 2, "pipeline": 2},
        "recompute": {"granularity": "full"},
        "optimizer": OVERLAP_BOTH,
    },
    "cp4-whole-optimizer": {
        "parallel": {"context": 4},
        "optimizer": {"learning_rate": 1e-4, "distributed": False},
    },
}


def _config(folder: Path, stage: str, name: str, layout: dict[str, dict[str, Any]]) -> RunConfig:
    source = {"manifest": folder / "data" / "train.jsonl", "thinking": False}
    source["rewards"] = ["tests.training.own_rewards:variety"]
    train = {"stage": stage, "run_dir": folder / "runs" / f"{stage}-{name}", "num_steps": NUM_STEPS}
    sections = {
        "train": {**train, "prompts_per_step": 8, "microbatch_tokens": 200},
        "data": {**workspace.config(folder, stage).data.model_dump(), "sources": [source]},
        "optimizer": {"learning_rate": 1e-4},
        **layout,
    }
    return workspace.config(folder, stage, **sections)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a finished run of each stage in a single process."""
    folder = workspace.create(tmp_path_factory.mktemp("layouts"), num_videos=12)
    for stage in ("sft", "grpo"):
        assert train(_config(folder, stage, "alone", {})) == 0
    return folder


@pytest.fixture(scope="module")
def tied_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a model whose head is tied to its embedding: the first and the last stage both hold it.

    Three of its four layers add vision features, which therefore travel to the second stage.
    """
    folder = workspace.create(tmp_path_factory.mktemp("tied"), family="qwen3_vl", num_videos=12)
    for stage in ("sft", "grpo"):
        assert train(_config(folder, stage, "alone", {})) == 0
    return folder


@pytest.fixture(scope="module")
def experts_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a model whose layers have experts, which tensor-parallel ranks divide."""
    folder = workspace.create(tmp_path_factory.mktemp("experts"), family="qwen3_vl_moe", num_videos=12)
    for stage in ("sft", "grpo"):
        assert train(_config(folder, stage, "alone", {})) == 0
    return folder


def _train(config: RunConfig) -> int:
    mesh.initialize(config.parallel)
    with late_parameters():
        return train_in_world(config, ModelConfig.from_pretrained(config.model.path))


def _texts(run_dir: Path, step: int) -> list[tuple[str, list[str]]]:
    rows = map(json.loads, (run_dir / "rollouts" / f"step_{step}.jsonl").read_text().splitlines())
    return [(row["sample"]["id"], [response["text"] for response in row["responses"]]) for row in rows]


def _check_curve(run_dir: Path, alone: Path, names: Sequence[str]) -> None:
    for mine, expected in zip(workspace.metrics(run_dir), workspace.metrics(alone), strict=True):
        for name in ("loss", "grad_norm", "lr", "response_tokens/mean", *names):
            assert mine[name] == pytest.approx(expected[name], rel=TOLERANCE, abs=TOLERANCE), (mine["step"], name)
        assert mine["grad_norm"] > 0


# GRPO, with the same model and optimizer, covers the others.
@pytest.mark.parametrize("layout", ["dp4", "tp2-pp2-sp-recompute", "cp2-pp2-recompute-overlap"])
def test_sft_curve_matches_a_single_process(folder: Path, gloo_pool: GlooPool, layout: str) -> None:
    config = _config(folder, "sft", layout, LAYOUTS[layout])
    assert gloo_pool.run(_train, config) == [0] * 4
    _check_curve(config.train.run_dir, folder / "runs" / "sft-alone", ())


@pytest.mark.parametrize("stage, layout", [("sft", "tp2-pp2"), ("grpo", "tp2-pp2-sp-recompute")])
def test_curves_with_tied_embeddings_and_deepstack_match_in_a_pipeline(
    tied_folder: Path, gloo_pool: GlooPool, stage: str, layout: str
) -> None:
    config = _config(tied_folder, stage, layout, LAYOUTS[layout])
    assert gloo_pool.run(_train, config) == [0] * 4
    _check_curve(config.train.run_dir, tied_folder / "runs" / f"{stage}-alone", ())


@pytest.mark.parametrize("stage, layout", [("sft", "cp2-tp2-sp-vision-data-overlap"), ("grpo", "tp2-dp2")])
def test_curves_with_experts_match_a_single_process(
    experts_folder: Path, gloo_pool: GlooPool, stage: str, layout: str
) -> None:
    config = _config(experts_folder, stage, layout, LAYOUTS[layout])
    assert gloo_pool.run(_train, config) == [0] * 4
    _check_curve(config.train.run_dir, experts_folder / "runs" / f"{stage}-alone", ())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grpo_curve_and_responses_match_a_single_process(folder: Path, gloo_pool: GlooPool, layout: str) -> None:
    config = _config(folder, "grpo", layout, LAYOUTS[layout])
    assert gloo_pool.run(_train, config) == [0] * 4
    alone = folder / "runs" / "grpo-alone"
    _check_curve(config.train.run_dir, alone, ("reward/total", "kl", "entropy"))
    for step in range(1, NUM_STEPS + 1):
        assert _texts(config.train.run_dir, step) == _texts(alone, step)


def _train_until_killed(config: RunConfig) -> int:
    """Train; the last rank is killed in the second step's backward pass, while it sends gradients of keys."""
    scatter = context_attention.start_scatter

    def scatter_or_die(*args: Any) -> Any:
        if saved_steps(config.train.run_dir / "checkpoints"):
            os.kill(os.getpid(), signal.SIGKILL)
        return scatter(*args)

    mesh.initialize(config.parallel)
    if mesh.rank() == mesh.num_ranks() - 1:
        context_attention.start_scatter = scatter_or_die
    return train_in_world(config, ModelConfig.from_pretrained(config.model.path))


def _tensors(run_dir: Path) -> dict[str, list[Tensor]]:
    """Return the contents of the last checkpoint: weights and optimizer states."""
    folder = run_dir / "checkpoints" / f"step_{NUM_STEPS}" / MEGATRON_DIR
    return {key: [read_chunk(folder, part) for part in each.chunks] for key, each in read_metadata(folder).items()}


def test_a_killed_run_resumes_at_the_same_and_at_another_context_parallel_size(
    folder: Path, gloo_pool: GlooPool
) -> None:
    saves = {"checkpoint": {"every_steps": 1}}
    undisturbed = _config(folder, "grpo", "undisturbed", {**LAYOUTS["cp2-dp2"], **saves})
    assert gloo_pool.run(_train, undisturbed) == [0] * 4
    whole = workspace.metrics(undisturbed.train.run_dir)
    # Training waits for the first checkpoint: on a slow disk, one that is written meanwhile may be complete only after
    # the second step, which is then not killed.
    waits = {"checkpoint": {"every_steps": 1, "asynchronous": False}}
    killed = _config(folder, "grpo", "killed", {**LAYOUTS["cp2-dp2"], **waits})
    with pytest.raises(RankFailure, match="rank 3: the process was killed"):
        gloo_pool.run(_train_until_killed, killed)
    assert saved_steps(killed.train.run_dir / "checkpoints") == [1]
    for name, layout, tolerance in (
        ("same", LAYOUTS["cp2-dp2"], 0),
        ("other", {"parallel": {"context": 4}}, TOLERANCE),
    ):
        resumed = _config(folder, "grpo", f"resumed-{name}", {**layout, **saves})
        shutil.copytree(killed.train.run_dir, resumed.train.run_dir)
        assert gloo_pool.run(_train, resumed) == [0] * 4
        for mine, expected in zip(workspace.metrics(resumed.train.run_dir), whole, strict=True):
            for key in ("loss", "grad_norm", "kl", "entropy", "reward/total"):
                assert mine[key] == pytest.approx(expected[key], rel=tolerance, abs=tolerance), (name, key)
    exact, same = (_tensors(folder / "runs" / f"grpo-{name}") for name in ("undisturbed", "resumed-same"))
    assert exact.keys() == same.keys()
    assert all(torch.equal(*pair) for key in exact for pair in zip(exact[key], same[key], strict=True))


def test_several_updates_per_rollout_match_a_single_process(folder: Path, gloo_pool: GlooPool) -> None:
    """With as many minibatches as prompts, one replica has no group in each, but still takes part in the update."""
    grpo = {"group_size": 2, "num_minibatches": 4, "epochs_per_rollout": 2, "loss_normalization": "token"}
    grpo |= {"importance_level": "sequence", "clip_low": 1e-3, "clip_high": 1e-3, "rollout_ratio_cap": 2.0}
    run_dirs = []
    for name, layout in (("several-alone", {}), ("several", LAYOUTS["pp2-dp2"])):
        config = _config(folder, "grpo", name, {"grpo": grpo, **layout})
        run = config.train.model_copy(update={"num_steps": 1, "prompts_per_step": 4})
        config = config.model_copy(update={"train": run})
        assert gloo_pool.run(_train, config) == [0] * 4 if layout else train(config) == 0
        run_dirs.append(run.run_dir)
    alone, several = run_dirs
    _check_curve(several, alone, ("kl", "entropy", "ratio/mean", "clip_fraction", "mismatch/mean_abs"))
    assert all(row["clip_fraction"] > 0.1 for row in workspace.metrics(alone))


def test_replicas_without_groups_take_part_in_the_update(folder: Path, gloo_pool: GlooPool) -> None:
    """Dynamic sampling keeps more groups on some replicas than on others, and none on some."""
    few = {"grpo": {"dynamic_sampling": True, "max_refills": 1, "group_size": 2}, "rollout": {"max_new_tokens": 3}}
    rows = {}
    for name in ("few-alone", "few"):
        config = _config(folder, "grpo", name, few)
        (source,) = config.data.model_dump()["sources"]
        data = {**config.data.model_dump(), "sources": [{**source, "rewards": [RARE_REWARD]}]}
        config = RunConfig.model_validate(
            {**config.model_dump(), "data": data, "train": {**config.train.model_dump(), "num_steps": 1}}
        )
        assert train(config) == 0 if name == "few-alone" else gloo_pool.run(_train, config) == [0] * 4
        rows[name] = workspace.metrics(config.train.run_dir)[0]
        texts = _texts(config.train.run_dir, 1)
        assert 0 < sum(len({"a" <= text[:1] <= "g" for text in responses}) > 1 for _, responses in texts) < 4
    assert rows["few"]["loss"] == pytest.approx(rows["few-alone"]["loss"], rel=TOLERANCE, abs=TOLERANCE)
    assert rows["few"]["grad_norm"] == pytest.approx(rows["few-alone"]["grad_norm"], rel=TOLERANCE)
    assert rows["few"]["grad_norm"] > 0
