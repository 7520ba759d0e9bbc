"""Saving and resuming a toy run, at several layouts and with both optimizers."""

from __future__ import annotations

import os
import resource
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_vcr1.checkpoint.model_dir import MEGATRON_DIR
from megatron_vcr1.checkpoint.optimizer_state import optimizer_slices
from megatron_vcr1.checkpoint.run_store import RunStore
from megatron_vcr1.checkpoint.shard_slices import parameter_slices
from megatron_vcr1.checkpoint.step_dirs import saved_steps
from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.config.training_sections import CheckpointSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import mesh
from tests.checkpoint.toy_run import ToyRun
from tests.gloo import GlooPool
from tests.model import tiny

pytestmark = pytest.mark.xdist_group("gloo")

Settings = dict[str, dict[str, Any]]

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4": {},
    "tp2-sp": {"tensor": 2, "sequence_parallel": True},
    "tp2-vision-data": {"tensor": 2, "vision": "data"},
    "pp2": {"pipeline": 2},
    "tp2-pp2": {"tensor": 2, "pipeline": 2},
    "pp4": {"pipeline": 4},
}


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of all families."""
    folder = tmp_path_factory.mktemp("models")
    for family in tiny.FAMILIES:
        tiny.create(family, folder / family)
    return {family: folder / family for family in tiny.FAMILIES}


def _save_and_continue(model_dir: Path, directory: Path, settings: Settings) -> tuple[Any, dict[str, Tensor]]:
    run = ToyRun(model_dir, directory, settings)
    assert run.resume() is None
    run.train(2)
    run.save()
    rest = run.train(2)  # while the checkpoint is being written
    run.store.finish()
    return rest, run.weights()


def _resume(model_dir: Path, directory: Path, settings: Settings) -> tuple[Any, dict[str, Tensor]]:
    run = ToyRun(model_dir, directory, settings)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.fill_(torch.nan)
    assert run.resume() == 2
    return run.train(2), run.weights()


@pytest.mark.parametrize(
    "family, layout, settings",
    [
        ("qwen2_5_vl", "tp2-pp2", {}),
        ("qwen2_5_vl", "dp4", {"model": {"dtype": "bfloat16"}}),
        # No parameter is trained on the second stage.
        ("qwen2_5_vl", "pp2", {"model": {"freeze": ["vision_tower", "language_model"]}}),
        ("qwen2_vl", "tp2-pp2", {"model": {"freeze": ["vision_tower"]}, "optimizer": {"distributed": False}}),
        ("qwen2_vl", "tp2-vision-data", {"model": {"dtype": "bfloat16"}, "optimizer": {"distributed": False}}),
        ("qwen2_vl", "pp2", {"checkpoint": {"asynchronous": False}}),
        ("qwen3_vl", "pp4", {}),
        ("qwen3_vl_moe", "tp2-sp", {}),
    ],
)
def test_resume_is_bitwise_identical(
    model_dirs: dict[str, Path], tmp_path: Path, gloo_pool: GlooPool, family: str, layout: str, settings: Settings
) -> None:
    settings = {**settings, "parallel": LAYOUTS[layout]}
    whole = gloo_pool.run(_save_and_continue, model_dirs[family], tmp_path, settings)
    resumed = gloo_pool.run(_resume, model_dirs[family], tmp_path, settings)
    for (losses, weights), (resumed_losses, resumed_weights) in zip(whole, resumed, strict=True):
        assert resumed_losses == losses
        assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)


@pytest.mark.parametrize(
    "family, saved_at, loaded_at",
    [
        ("qwen2_vl", "tp2-pp2", ("dp4", "tp2-vision-data", "pp4")),
        ("qwen2_5_vl", "tp2-vision-data", ("tp2-sp", "pp2")),
        ("qwen3_vl_moe", "tp2-sp", ("dp4",)),
    ],
)
def test_a_run_resumes_under_another_layout(
    model_dirs: dict[str, Path],
    tmp_path: Path,
    gloo_pool: GlooPool,
    family: str,
    saved_at: str,
    loaded_at: tuple[str, ...],
) -> None:
    model_dir = model_dirs[family]
    whole, _ = gloo_pool.run(_save_and_continue, model_dir, tmp_path, {"parallel": LAYOUTS[saved_at]})[0]
    for layout in loaded_at:
        settings = {"parallel": LAYOUTS[layout], "optimizer": {"distributed": layout != "pp4"}}
        for losses, _ in gloo_pool.run(_resume, model_dir, tmp_path, settings):
            assert torch.tensor(losses) == pytest.approx(torch.tensor(whole), rel=1e-6), layout


def _all_values(run: ToyRun) -> dict[str, Tensor]:
    """Return copies of this rank's weights and optimizer state."""
    parameters = parameter_slices(run.model)
    slices = [*chain.from_iterable(parameters.values())]
    slices += optimizer_slices(run.learner.optimizer, parameters, distributed=True)
    return {f"{part.key} {part.offsets} {part.start}": part.values.clone() for part in slices}


def _load_with_megatron_core(model_dir: Path, directory: Path, settings: Settings) -> None:
    run = ToyRun(model_dir, directory, settings)
    assert run.resume() == 2
    ours = _all_values(run)
    run.train(1)  # changes everything
    (optimizer,) = run.learner.optimizer.chained_optimizers
    model = run.model.sharded_state_dict()
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    state = {**run.model.sharded_state_dict()}
    state["optimizer"] = optimizer.sharded_state_dict(model, is_loading=True, metadata=metadata)["param_state"]
    loaded = dist_checkpointing.load(state, str(run.store.path(2) / MEGATRON_DIR))
    optimizer.load_parameter_state_from_fully_reshardable(loaded.pop("optimizer"))
    run.model.load_state_dict(loaded, strict=False)
    theirs = _all_values(run)
    assert len(ours) == len(theirs) > 50
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_megatron_core_loads_the_same_values(model_dirs: dict[str, Path], tmp_path: Path, gloo_pool: GlooPool) -> None:
    settings = {"model": {"dtype": "bfloat16"}}
    gloo_pool.run(_save_and_continue, model_dirs["qwen2_vl"], tmp_path, settings)
    gloo_pool.run(
        _load_with_megatron_core, model_dirs["qwen2_vl"], tmp_path, {**settings, "parallel": LAYOUTS["tp2-sp"]}
    )


def _fail_on_one_rank(model_dir: Path, directory: Path) -> tuple[str, list[int], list[int]]:
    run = ToyRun(model_dir, directory, {"parallel": LAYOUTS["tp2-pp2"]})
    run.save()
    run.steps = 1
    run.store.finish()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    run.save()  # returns without an error, because the write is in the background
    message = "no error"
    try:
        run.save()
    except OSError as error:
        message = str(error.strerror)
    before = saved_steps(directory)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run.save()
    run.store.finish()
    return message, before, saved_steps(directory)


def _open_on_local_disks(directory: Path) -> list[str]:
    mesh.initialize(ParallelSection())
    mine = directory / f"disk-{dist.get_rank() // 2}"  # two nodes with two ranks each
    with pytest.raises(UserError, match=r"rank 2 on .* does not see what rank 0 on .* writes there") as raised:
        RunStore(mine, CheckpointSection())
    assert f"{directory / 'disk-1'}: " in str(raised.value)
    RunStore(directory / "shared", CheckpointSection())
    return sorted(os.listdir(directory / "shared"))


def test_a_directory_that_not_all_nodes_share_is_refused_at_the_start(tmp_path: Path, gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(_open_on_local_disks, tmp_path)[0] == [".lock"]


def test_a_failed_write_on_one_rank_raises_on_all_ranks(
    model_dirs: dict[str, Path], tmp_path: Path, gloo_pool: GlooPool
) -> None:
    results = gloo_pool.run(_fail_on_one_rank, model_dirs["qwen2_vl"], tmp_path)
    assert results == [("File too large", [0], [0, 1])] * 4
