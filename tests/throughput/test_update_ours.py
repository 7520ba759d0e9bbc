"""Our update: microbatches, and gradients under published names."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_vcr1.parallel import mesh
from megatron_vcr1.throughput.update_case import UpdateCase
from megatron_vcr1.throughput.update_ours import OurUpdate
from tests.gloo import GlooPool

pytestmark = pytest.mark.xdist_group("gloo")


def test_microbatches_do_not_change_loss_or_gradients(
    case: UpdateCase, ours: tuple[float, Path], tmp_path: Path
) -> None:
    with mesh.world(case.run_config.parallel):
        assert len(OurUpdate(case).batches) == 2
    whole = dataclasses.replace(case, microbatch_tokens=10_000)
    with mesh.world(whole.run_config.parallel):
        update = OurUpdate(whole)
        assert len(update.batches) == 1
        weights = [parameter.data_ptr() for parameter in update.model.parameters()]
        assert update.run() == pytest.approx(ours[0], abs=1e-6)
        update.save_gradients(tmp_path / "gradients.safetensors")
        assert [parameter.data_ptr() for parameter in update.model.parameters()] == weights  # the weights are back
    expected, gradients = load_file(ours[1]), load_file(tmp_path / "gradients.safetensors")
    assert gradients.keys() == expected.keys()
    assert all(torch.allclose(gradients[name], expected[name], atol=1e-6, rtol=0) for name in expected)


def _loss(case: UpdateCase) -> float:
    mesh.initialize(case.run_config.parallel)
    return OurUpdate(case).run()


def test_context_parallelism_does_not_change_the_loss(
    case: UpdateCase, ours: tuple[float, Path], gloo_pool: GlooPool
) -> None:
    split = dataclasses.replace(case, context=2)
    assert gloo_pool.run(_loss, split) == pytest.approx([ours[0]] * 4, abs=1e-6)
