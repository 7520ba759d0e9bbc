"""Gradients that are reduced during the backward pass, and parameters that are gathered during the next forward pass.

Both give the same results, and checkpoints that other runs resume.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from megatron_vcr1.parallel import mesh
from megatron_vcr1.training import optimizer
from tests.checkpoint.toy_run import ToyRun
from tests.gloo import GlooPool
from tests.model import tiny
from tests.training.late_parameters import late_parameters

pytestmark = pytest.mark.xdist_group("gloo")

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"parallel": {"tensor": 2, "sequence_parallel": True}, "recompute": {"granularity": "selective"}},
    "pp2": {"parallel": {"pipeline": 2}, "recompute": {"granularity": "full"}},
}
SMALL_BUCKETS = partial(DistributedDataParallelConfig, bucket_size=20_000)


def _train(
    model_dir: Path, directory: Path, settings: dict[str, Any], *, overlaps: bool
) -> tuple[list[tuple[float, float]], list[int]]:
    """Do four steps, with a checkpoint after the third one; replica 1 has no microbatches in the second step.

    Returns:
        Loss and gradient norm of each step, and the number of buckets that were reduced before the end of its backward
        pass.
    """
    settings = {**settings, "optimizer": {"overlap_grad_reduce": overlaps, "overlap_param_gather": overlaps}}
    with mock.patch.object(optimizer, "DistributedDataParallelConfig", SMALL_BUCKETS):
        run = ToyRun(model_dir, directory, settings)
    assert run.learner.ddp_model.use_forward_hook == overlaps
    num_early = 0
    finish = _ParamAndGradBucketGroup.finish_grad_sync

    def finish_and_count(group: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal num_early
        num_early += getattr(group, "grad_reduce_handle", None) is not None
        finish(group, *args, **kwargs)

    results, early = [], []
    update = run.learner.update
    with mock.patch.object(_ParamAndGradBucketGroup, "finish_grad_sync", finish_and_count), late_parameters():
        for step in range(4):
            num_early = 0
            is_empty = step == 1 and mesh.replica_index() == 1
            run.learner.update = (lambda batches, loss: update([], loss)) if is_empty else update  # type: ignore[method-assign]
            results += run.train(1)
            early.append(num_early)
            if step == 2:
                run.learner.wait_for_parameters()
                run.save()
                run.store.finish()
    return results, early


def _resume(model_dir: Path, directory: Path) -> list[tuple[float, float]]:
    run = ToyRun(model_dir, directory, {"parallel": {"tensor": 4}})
    assert run.resume() == 3
    return run.train(1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_communication_during_computation_changes_nothing(tmp_path: Path, gloo_pool: GlooPool, layout: str) -> None:
    tiny.create("qwen2_5_vl", tmp_path / "model")
    train = partial(gloo_pool.run, _train, tmp_path / "model")
    expected = train(tmp_path / "plain", LAYOUTS[layout], overlaps=False)
    found = train(tmp_path / "overlaps", LAYOUTS[layout], overlaps=True)
    for (results, early), (expected_results, never) in zip(found, expected, strict=True):
        for step, expected_step in zip(results, expected_results, strict=True):
            assert step == pytest.approx(expected_step, rel=1e-5)  # the norm is a sum over other parts
        # megatron-core learns in the first update which weights have gradients. A replica has no microbatches in the
        # second one.
        assert never == [0] * 4 and early[0] == 0
        assert early[1] == early[2] == early[3]
    # Only the first stage's buckets are small: megatron-core reduces those of later stages at once.
    assert max(early[2] for _, early in found) > 2
    for results in gloo_pool.run(_resume, tmp_path / "model", tmp_path / "overlaps"):
        assert results[0] == pytest.approx(expected[0][0][3], rel=1e-4)
