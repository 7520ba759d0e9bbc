from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import layers
from torch import Tensor

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.packed_batch import pack
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.training.microbatches import Microbatch
from megatron_vcr1.training.optimizer import Learner
from tests.gloo import GlooPool
from tests.model import tiny


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("optimizer")
    tiny.create("qwen2_5_vl", folder)
    return folder


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with mesh.world(ParallelSection()):
        yield


def _learner(model_dir: Path, dtype: str = "float32", **settings: Any) -> tuple[Learner, Microbatch]:
    run = RunConfig.model_validate({"model": {"path": model_dir, "dtype": dtype}, "optimizer": settings})
    config = ModelConfig.from_pretrained(model_dir)
    model = build_model(config, run.model, run.parallel, run.recompute)
    load_model_weights(model, model_dir)
    packed = pack([Group("g", tiny.prompt("i", seed=0), tiny.responses((5,), seed=1))], config)
    return Learner(model, run.optimizer, num_steps=10), Microbatch(packed)


def _update(learner: Learner, batches: list[Microbatch], factor: float = 1.0) -> tuple[float, float, bool]:
    def loss(batch: Microbatch, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return -learner.model.log_probs(hidden, batch.packed.target_ids).mean() * factor, {}

    update = learner.update(batches, loss)
    return update.loss, update.grad_norm, update.applied


def _weights(learner: Learner) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.model.named_parameters()}


def test_gradients_accumulate_over_microbatches_and_are_cleared_after_a_step(model_dir: Path) -> None:
    learner, batch = _learner(model_dir, learning_rate=1e-12)
    loss, norm, _ = _update(learner, [batch])
    assert _update(learner, [batch, batch])[:2] == pytest.approx((2 * loss, 2 * norm), rel=1e-5)
    assert _update(learner, [batch])[:2] == pytest.approx((loss, norm), rel=1e-5)


def test_linear_layers_accumulate_weight_gradients_in_the_buffers(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, batch = _learner(model_dir)
    addition, buffers = layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32, set()

    def add(x: Tensor, grad_output: Tensor, weight_grad: Tensor) -> None:
        buffers.add(weight_grad.data_ptr())
        addition(x, grad_output, weight_grad)

    monkeypatch.setattr(layers.fused_weight_gradient_mlp_cuda, "wgrad_gemm_accum_fp32", add)
    _update(learner, [batch])
    kinds = (layers.ColumnParallelLinear, layers.RowParallelLinear)
    linears = {name: layer.weight for name, layer in learner.model.named_modules() if isinstance(layer, kinds)}
    del linears["language_model.output_layer"]  # the loss uses its weight, not the layer
    assert buffers == {weight.main_grad.data_ptr() for weight in linears.values()}


def test_grad_norm_is_reported_before_clipping(model_dir: Path) -> None:
    """Adam's first step does not depend on the gradient's scale unless epsilon matters, so epsilon shows clipping."""
    changes = []
    for max_grad_norm in (0.0, 1e-9):
        learner, batch = _learner(model_dir, learning_rate=1e-3, max_grad_norm=max_grad_norm, epsilon=1e-8)
        before = _weights(learner)
        _, norm, applied = _update(learner, [batch])
        assert applied and norm > 0.1
        changes.append(max(float((weight - before[name]).abs().max()) for name, weight in _weights(learner).items()))
    assert changes[0] == pytest.approx(1e-3, rel=1e-2) and changes[1] < 1e-4


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_update_that_is_not_finite_changes_nothing(model_dir: Path, factor: float) -> None:
    learner, batch = _learner(model_dir, learning_rate=1e-2)
    before = _weights(learner)
    assert not _update(learner, [batch], factor)[2]
    assert all(torch.equal(weight, before[name]) for name, weight in _weights(learner).items())
    assert not any(group.get("step") for group in learner.optimizer.param_groups)
    assert _update(learner, [batch])[2]


def test_update_without_microbatches_has_no_gradient(model_dir: Path) -> None:
    """A replica without groups still takes part in the update of the others."""
    learner, batch = _learner(model_dir, learning_rate=1e-2)
    _update(learner, [batch])
    assert _update(learner, []) == (0.0, 0.0, True)


def _train_in_bfloat16(model_dir: Path) -> bool:
    """Check that updates far below a weight's last bit add up: 40 of them change a weight, a single one does not.

    Returns whether the optimizer's state is sharded over the replicas.
    """
    learner, batch = _learner(model_dir, "bfloat16", learning_rate=1e-4)
    name = (
        "language_model.decoder.final_layernorm.weight"  # near 1, where the last bit of bfloat16 is 2 ** -7 or 2 ** -8
    )
    before = _weights(learner)[name]
    _update(learner, [batch])
    assert torch.equal(_weights(learner)[name], before)
    for _ in range(39):
        _update(learner, [batch])
    assert not torch.equal(_weights(learner)[name], before)
    return isinstance(learner.optimizer.chained_optimizers[0], DistributedOptimizer)


def test_bfloat16_weights_accumulate_updates_in_float32(model_dir: Path) -> None:
    assert not _train_in_bfloat16(model_dir)  # a single replica has nothing to shard


def _train_in_world(model_dir: Path) -> bool:
    mesh.initialize(ParallelSection())
    return _train_in_bfloat16(model_dir)


@pytest.mark.xdist_group("gloo")
def test_bfloat16_weights_of_several_replicas_accumulate_updates_in_float32(
    model_dir: Path, gloo_pool: GlooPool
) -> None:
    assert gloo_pool.run(_train_in_world, model_dir) == [True] * 4


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1.0] * 10),
        ({"decay": "linear"}, [1 - step / 10 for step in range(10)]),
        ({"warmup_steps": 4}, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]),
        (
            {"warmup_steps": 2, "decay": "linear", "min_learning_rate": 0.2},
            [0, 0.5, *(1 - step / 10 for step in range(8))],
        ),
    ],
)
def test_learning_rate_schedules(model_dir: Path, settings: dict[str, Any], expected: list[float]) -> None:
    learner, _ = _learner(model_dir, learning_rate=1.0, **settings)
    assert [learner.end_step() for _ in range(10)] == pytest.approx(expected)
