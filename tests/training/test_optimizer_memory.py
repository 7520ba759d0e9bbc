"""Settings that save memory of gradients and optimizer state: the same training, and checkpoints that others resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.toy_run import ToyRun
from tests.gloo import GlooPool
from tests.model import tiny

pytestmark = pytest.mark.xdist_group("gloo")

# A layout with two replicas. Moments in bfloat16 need such a decay.
OPTIMIZER = {"beta2": 0.95}
LAYOUT: dict[str, Any] = {"parallel": {"tensor": 2, "sequence_parallel": True}, "model": {"dtype": "bfloat16"}}
NUM_STEPS = 4
# Relative, for gradients or moments that are rounded to bfloat16. With AVX-512, AVX2 and SSE, losses differed by up to
# 8e-4, and gradient norms by up to 4e-3.
LOSS_TOLERANCE = 3e-3
NORM_TOLERANCE = 1.5e-2

Results = list[tuple[float, float]]


def _train(model_dir: Path, directory: Path, settings: dict[str, Any]) -> Results:
    """Return the loss and gradient norm of each step; the third one is saved."""
    run = ToyRun(model_dir, directory, {**LAYOUT, "optimizer": {**OPTIMIZER, **settings}})
    if "grad_dtype" in settings:
        assert all(buffer.grad_data.dtype == torch.bfloat16 for buffer in run.learner.ddp_model.buffers)
    results = run.train(NUM_STEPS - 1)
    run.save()
    run.store.finish()
    return results + run.train(1)


def _resume(model_dir: Path, directory: Path, settings: dict[str, Any]) -> Results:
    """Return the loss and gradient norm of the step after the checkpoint, under another layout."""
    layout = {"parallel": {"pipeline": 2}, "model": {"dtype": "bfloat16"}}
    run = ToyRun(model_dir, directory, {**layout, "optimizer": {**OPTIMIZER, **settings}})
    assert run.resume() == NUM_STEPS - 1
    return run.train(1)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    tiny.create("qwen2_5_vl", folder)
    return folder


@pytest.fixture(scope="module")
def default_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of the run with the default settings, see `expected`."""
    return tmp_path_factory.mktemp("default")


@pytest.fixture(scope="module")
def expected(model_dir: Path, default_dir: Path, gloo_pool: GlooPool) -> Results:
    """The results with the default settings."""
    return gloo_pool.run(_train, model_dir, default_dir, {})[0]


def _check(results: list[Results], expected: Results) -> None:
    for rank_results in results:
        for (loss, norm), (expected_loss, expected_norm) in zip(rank_results, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=LOSS_TOLERANCE)
            assert norm == pytest.approx(expected_norm, rel=NORM_TOLERANCE)


def test_bfloat16_gradients_change_losses_by_rounding_alone(
    model_dir: Path, expected: Results, gloo_pool: GlooPool, tmp_path: Path
) -> None:
    settings = {"grad_dtype": "bfloat16", "overlap_grad_reduce": True, "overlap_param_gather": True}
    results = gloo_pool.run(_train, model_dir, tmp_path, settings)
    _check(results, expected)
    assert results[0][0] != expected[0]
    _check(gloo_pool.run(_resume, model_dir, tmp_path, {}), expected[-1:])


def test_state_in_host_memory_changes_nothing(
    model_dir: Path, expected: Results, default_dir: Path, gloo_pool: GlooPool, tmp_path: Path
) -> None:
    settings = {"state": "host"}
    assert gloo_pool.run(_train, model_dir, tmp_path, settings) == [expected] * 4
    resumed = [gloo_pool.run(_resume, model_dir, *run) for run in ((tmp_path, {}), (default_dir, settings))]
    assert resumed[0] == resumed[1]
    _check(resumed[0], expected[-1:])


def test_bfloat16_moments_change_losses_by_rounding_alone(
    model_dir: Path, expected: Results, gloo_pool: GlooPool, tmp_path: Path
) -> None:
    settings = {"first_moment_dtype": "bfloat16", "second_moment_dtype": "bfloat16", "state": "host"}
    results = gloo_pool.run(_train, model_dir, tmp_path, settings)
    _check(results, expected)
    assert results[0] != expected
    _check(gloo_pool.run(_resume, model_dir, tmp_path, {}), expected[-1:])
