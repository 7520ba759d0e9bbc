"""Steps in which replicas, microbatches or all ranks have no image and no video match transformers in every layout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.context_shard import pack_for_rank
from megatron_vcr1.model.video_language_model import VideoLanguageModel, build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.training.microbatches import Microbatch
from megatron_vcr1.training.optimizer import Learner
from tests.gloo import GlooPool
from tests.model import tiny

pytestmark = pytest.mark.xdist_group("gloo")

TOLERANCE = 1e-5
# The microbatches of each step. A microbatch is a list of prompts, each named after its i(mages) and v(ideos). Replicas
# take consecutive parts, so one of them has text alone in the first step, and another one images and videos.
STEPS = (
    (("",), ("",), ("i",), ("v", "")),
    (("",), ("", "")),  # no rank has vision, and of four replicas, two have no microbatch
    (("v",), ("",), ("",), ("ivv",)),  # vision first and text last, and the other way round
)
# Without momentum and with a large epsilon, a step of Adam subtracts GRADIENT_SCALE times the gradient. The weights
# after it therefore show every gradient, also with the distributed optimizer, which leaves a rank only a shard of them.
GRADIENT_SCALE = 0.1
EPSILON = 1e5
OPTIMIZER = {"learning_rate": GRADIENT_SCALE * EPSILON, "epsilon": EPSILON, "beta1": 0.0, "beta2": 0.0}
OPTIMIZER |= {"max_grad_norm": 0.0, "weight_decay": 0.0}

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp4": {},
    "dp4-whole-optimizer": {"optimizer": {"distributed": False}},
    "dp2-pp2": {"parallel": {"pipeline": 2}},
    "dp2-tp2": {"parallel": {"tensor": 2}},
    "dp2-tp2-sp-vision-data": {"parallel": {"tensor": 2, "sequence_parallel": True, "vision": "data"}},
    "tp2-pp2-sp-recompute": {
        "parallel": {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
        "recompute": {"granularity": "full"},
    },
}
FROZEN = {"all-trained": (), "frozen-language-model": ("language_model",)}


def _groups(step: int, microbatch: int) -> list[Group]:
    kinds = STEPS[step][microbatch]
    seeds = [1000 * step + 10 * microbatch + index for index in range(len(kinds))]
    return [
        Group(str(seed), tiny.prompt(kind, seed), tiny.responses((2 + seed % 3, 3), seed + 1))
        for kind, seed in zip(kinds, seeds, strict=True)
    ]


def _num_targets(step: int) -> int:
    groups = [group for microbatch in range(len(STEPS[step])) for group in _groups(step, microbatch)]
    return sum(len(response) for group in groups for response in group.responses)


def _reference_step(model: nn.Module, config: ModelConfig, step: int) -> list[float]:
    """Do a step of gradient descent with transformers' model; return the loss and the gradient norm."""
    model.zero_grad()
    loss = torch.zeros(())
    for microbatch in range(len(STEPS[step])):
        for group in _groups(step, microbatch):
            for response in group.responses:
                logits = tiny.transformers_logits(model, config, group.prompt, response)
                loss = loss - logits.log_softmax(-1).gather(1, response[:, None]).sum() / _num_targets(step)
    if loss.requires_grad:  # not if only the vision tower is trained and there is no vision
        loss.backward()
    gradients = [(weight, weight.grad) for weight in model.parameters() if weight.grad is not None]
    with torch.no_grad():
        for weight, gradient in gradients:
            weight -= GRADIENT_SCALE * gradient
    return [loss.item(), math.sqrt(sum(float(gradient.square().sum()) for _, gradient in gradients))]


@pytest.fixture(scope="module")
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a model, the model after all steps, and the losses and gradient norms; and the frozen parts."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny.create("qwen2_5_vl", folder / "model").train()
    if FROZEN[request.param]:
        model.model.language_model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
    config = ModelConfig.from_pretrained(folder / "model")
    curve = [_reference_step(model, config, step) for step in range(len(STEPS))]
    model.save_pretrained(folder / "trained")
    save_file({"curve": torch.tensor(curve)}, folder / "curve.safetensors")
    return folder, request.param


def _train(folder: Path, frozen: str, layout: dict[str, Any]) -> dict[str, float]:
    """Do all steps in a layout; return the largest differences from transformers on this rank."""
    settings = {"model": {"path": folder / "model", "dtype": "float32", "freeze": FROZEN[frozen]}, **layout}
    run = RunConfig.model_validate({**settings, "optimizer": {**OPTIMIZER, **layout.get("optimizer", {})}})
    mesh.initialize(run.parallel)
    model = _build(folder, run, "model")
    learner = Learner(model, run.optimizer, num_steps=len(STEPS))
    curve = torch.tensor([_step(learner, step) for step in range(len(STEPS))])
    expected = load_file(folder / "curve.safetensors")["curve"]
    weights, trained = dict(model.named_parameters()), _build(folder, run, "trained").named_parameters()
    return {
        "loss": float((curve[:, 0] - expected[:, 0]).abs().max()),
        "grad_norm": float(((curve[:, 1] - expected[:, 1]) / expected[:, 1].clamp(min=1e-3)).abs().max()),
        "weight": max(float((weights[name] - weight).abs().max()) for name, weight in trained),
    }


def _build(folder: Path, run: RunConfig, weights: str) -> VideoLanguageModel:
    model = build_model(ModelConfig.from_pretrained(folder / "model"), run.model, run.parallel, run.recompute)
    load_model_weights(model, folder / weights)
    return model


def _step(learner: Learner, step: int) -> tuple[float, float]:
    model, num_targets = learner.model, _num_targets(step)
    batches = [
        Microbatch(
            pack_for_rank(_groups(step, microbatch), model.model_config, pad_to_multiple_of=model.token_multiple)
        )
        for microbatch in _microbatches_of_replica(step)
    ]

    def loss(batch: Microbatch, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return -model.log_probs(hidden, batch.packed.target_ids).sum() / num_targets, {}

    update = learner.update(batches, loss)
    assert update.applied
    return update.loss, update.grad_norm


def _microbatches_of_replica(step: int) -> Sequence[int]:
    microbatches = range(len(STEPS[step]))
    per_replica = math.ceil(len(microbatches) / mesh.num_replicas())
    return microbatches[mesh.replica_index() * per_replica :][:per_replica]


CASES = [(layout, "all-trained") for layout in LAYOUTS]
CASES += [(layout, "frozen-language-model") for layout in ("dp4", "dp2-tp2-sp-vision-data", "tp2-pp2-sp-recompute")]


@pytest.mark.parametrize(("layout", "reference"), CASES, indirect=["reference"])
def test_steps_equal_transformers(reference: tuple[Path, str], gloo_pool: GlooPool, layout: str) -> None:
    for rank, worst in enumerate(gloo_pool.run(_train, *reference, LAYOUTS[layout])):
        assert all(value <= TOLERANCE for value in worst.values()), f"rank {rank}: {worst}"


@pytest.mark.parametrize("reference", FROZEN, indirect=True)
def test_a_single_process_equals_transformers(reference: tuple[Path, str]) -> None:
    try:
        worst = _train(*reference, {})
    finally:
        mesh.shutdown()
    assert all(value <= TOLERANCE for value in worst.values()), worst
