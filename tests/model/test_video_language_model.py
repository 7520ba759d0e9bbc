"""The model against transformers: logits and every gradient, in every layout, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.context_shard import pack_for_rank
from megatron_vcr1.model.packed_batch import PackedBatch, pack
from megatron_vcr1.model.video_language_model import VideoLanguageModel, build_model
from megatron_vcr1.parallel import mesh, schedule
from megatron_vcr1.parallel.context import sum_over_context_ranks
from megatron_vcr1.training.optimizer import finalize_gradients
from tests.gloo import GlooPool
from tests.model import tiny
from tests.model.collective_order import Collective, RecordedCollectives, in_common

pytestmark = pytest.mark.xdist_group("gloo")

TOLERANCE = 1e-5
# The images (i) and videos (v) of a prompt, and the lengths of its responses.
CASES = (("", (3, 5)), ("i", (4, 1, 2, 3, 5, 2, 1, 6)), ("v", (6,)), ("ivv", (2, 7)))
# Cases that share a microbatch: two together, one alone, and one without vision input.
MICROBATCHES = ((1, 2), (3,), (0,))

LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "tp1": {},
    "tp2": {"parallel": {"tensor": 2}},
    "tp4-sp-more-ranks-than-kv-heads": {"parallel": {"tensor": 4, "sequence_parallel": True}},
    "pp2": {"parallel": {"pipeline": 2}},
    "pp2-uneven-recompute-full": {
        "parallel": {"pipeline": 2, "first_stage_layers": 1},
        "recompute": {"granularity": "full"},
    },
    "pp4": {"parallel": {"pipeline": 4}},
    "tp2-pp2": {"parallel": {"tensor": 2, "pipeline": 2}},
    "tp2-pp2-sp-recompute-full": {
        "parallel": {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
        "recompute": {"granularity": "full"},
    },
    "tp2-pp2-sp-recompute-selective": {
        "parallel": {"tensor": 2, "pipeline": 2, "sequence_parallel": True},
        "recompute": {"granularity": "selective", "modules": ["core_attn", "mlp"]},
    },
    "cp2": {"parallel": {"context": 2}},  # times two replicas
    "cp4": {"parallel": {"context": 4}},
    "cp2-tp2-sp-recompute-selective": {
        "parallel": {"context": 2, "tensor": 2, "sequence_parallel": True},
        "recompute": {"granularity": "selective", "modules": ["core_attn", "mlp"]},
    },
    "cp2-pp2-recompute-full": {
        "parallel": {"context": 2, "pipeline": 2},
        "recompute": {"granularity": "full"},
    },
    "tp4-sp-vision-data": {"parallel": {"tensor": 4, "sequence_parallel": True, "vision": "data"}},
    "tp2-pp2-sp-vision-data-recompute-full": {
        "parallel": {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "vision": "data"},
        "recompute": {"granularity": "full"},
    },
    "cp2-tp2-vision-data": {"parallel": {"context": 2, "tensor": 2, "vision": "data"}},
}


def _group(case: int, config: ModelConfig) -> Group:
    kinds, lengths = CASES[case]
    prompt = tiny.prompt(kinds, seed=case, timestamps=config.media.timestamps_as_text)
    return Group(str(case), prompt, tiny.responses(lengths, seed=100 + case))


def _coefficients(num_targets: int) -> Tensor:
    """Return coefficients of the log-probs in the loss, of both signs."""
    return torch.linspace(-1.0, 1.5, num_targets)


NUM_TARGETS = sum(sum(lengths) for _, lengths in CASES)


@pytest.fixture
def world() -> Iterator[None]:
    with mesh.world(ParallelSection()):
        yield


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and its gradients (stored as weights), logits and loss as transformers computes them."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny.create(request.param, folder / "model")
    config = ModelConfig.from_pretrained(folder / "model")
    logits, loss = {}, torch.zeros(())
    for case in range(len(CASES)):
        group = _group(case, config)
        case_logits = torch.cat(
            [tiny.transformers_logits(model, config, group.prompt, response) for response in group.responses]
        )
        log_probs = case_logits.log_softmax(-1).gather(1, torch.cat(group.responses)[:, None])[:, 0]
        loss = loss + (log_probs * _coefficients(len(log_probs))).sum() / NUM_TARGETS
        logits[str(case)] = case_logits.detach()
    loss.backward()
    tiny.save_gradients(model, folder / "gradients", folder / "model")
    save_file({**logits, "loss": loss.detach()}, folder / "expected.safetensors")
    return folder


def _build(folder: Path, settings: dict[str, Any]) -> VideoLanguageModel:
    run = RunConfig.model_validate({"model": {"path": folder / "model", "dtype": "float32"}, **settings})
    model = build_model(ModelConfig.from_pretrained(folder / "model"), run.model, run.parallel, run.recompute)
    load_model_weights(model, folder / "model")
    return model.train()


def _forward_backward(
    model: VideoLanguageModel, ddp: dict[str, bool]
) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Run all cases through the pipeline schedule; return the last stage's metrics and this rank's gradients.

    Args:
        ddp: settings of megatron-core's data parallelism; empty for its defaults.
    """
    model.config.finalize_model_grads_func = finalize_gradients
    parallel = DistributedDataParallel(model.config, DistributedDataParallelConfig(**ddp), model)
    model.config.no_sync_func = parallel.no_sync
    parallel.zero_grad_buffer()
    config, multiple = model.model_config, model.token_multiple
    batches = [
        pack_for_rank([_group(case, config) for case in cases], config, pad_to_multiple_of=multiple)
        for cases in MICROBATCHES
    ]
    coefficients = [torch.cat([_coefficients(sum(CASES[case][1])) for case in cases]) for cases in MICROBATCHES]

    def loss(batch: PackedBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        index = next(i for i, other in enumerate(batches) if other is batch)
        if ddp:  # `log_probs` writes the head's gradient to its buffer itself, which does not start the reduction
            logits = torch.nn.functional.linear(hidden, model.head_weight())
            log_probs = logits.log_softmax(-1).gather(1, batch.target_ids[:, None])[:, 0]
        else:
            log_probs = model.log_probs(hidden, batch.target_ids)
        value = (log_probs * batch.select_targets(coefficients[index])).sum() / NUM_TARGETS
        logits = batch.gather_targets(model.logits(hidden.detach()))
        metrics = {"loss": float(sum_over_context_ranks(value.detach())), "logits": logits}
        return value / mesh.num_replicas(), metrics  # every replica computes all cases, and gradients are summed

    metrics = schedule.forward_backward(parallel, batches, loss)
    return metrics, {name: parameter.main_grad for name, parameter in model.named_parameters()}


def _compare(folder: Path, settings: dict[str, Any], **ddp: bool) -> dict[str, float]:
    """Return the largest differences from transformers on this rank."""
    mesh.initialize(RunConfig.model_validate({"model": {"path": folder}, **settings}).parallel)
    model = _build(folder, settings)
    expected_results = load_file(folder / "expected.safetensors")
    metrics, gradients = _forward_backward(model, ddp)
    load_model_weights(model, folder / "gradients")  # instead of the weights, which are not needed any more
    expected = dict(model.named_parameters())
    assert gradients.keys() == expected.keys()
    worst = {"gradient": max(float((gradients[name] - expected[name]).abs().max()) for name in expected)}
    if mesh.is_last_stage():
        expected_logits = torch.cat([expected_results[str(case)] for cases in MICROBATCHES for case in cases])
        logits = torch.cat([results["logits"] for results in metrics])
        worst["logits"] = float((logits - expected_logits).abs().max())
        worst["loss"] = abs(sum(results["loss"] for results in metrics) - float(expected_results["loss"]))
    return worst


def _loss_and_gradients(model: VideoLanguageModel, batches: list[PackedBatch]) -> tuple[float, dict[str, Tensor]]:
    """Return the mean log-prob of all targets and its gradients, without the pipeline schedule."""
    model.zero_grad()
    total = torch.zeros(())
    for batch in batches:
        total = total + model.log_probs(model(batch), batch.target_ids).sum()
    loss = total / sum(len(batch.target_ids) for batch in batches)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_shared_prefix_gives_the_loss_and_gradient_of_separate_prompts(reference: Path, world: None) -> None:
    model = _build(reference, {})
    config = model.model_config
    prompt = tiny.prompt("iv", seed=7, timestamps=config.media.timestamps_as_text)
    shared = [Group("g", prompt, tiny.responses((5, 1, 3, 8), seed=8)), _group(0, config)]
    separate = [Group(group.id, group.prompt, (response,)) for group in shared for response in group.responses]
    loss, gradients = _loss_and_gradients(model, [pack(shared, config)])
    expected_loss, expected = _loss_and_gradients(model, [pack([group], config) for group in separate])
    assert gradients.keys() == expected.keys()
    assert abs(loss - expected_loss) <= TOLERANCE
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_loss_and_every_gradient_equal_transformers(reference: Path, gloo_pool: GlooPool, layout: str) -> None:
    differences = gloo_pool.run(_compare, reference, LAYOUTS[layout])
    assert any("logits" in worst for worst in differences)
    for rank, worst in enumerate(differences):
        assert all(value <= TOLERANCE for value in worst.values()), f"rank {rank}: {worst}"


with_deepstack = pytest.mark.parametrize("reference", ["qwen3_vl"], indirect=True)


@with_deepstack
def test_every_weight_has_a_gradient_in_a_microbatch_without_vision(reference: Path, gloo_pool: GlooPool) -> None:
    """Only then can megatron-core reduce the gradients during the backward pass of the last microbatch."""
    for worst in gloo_pool.run(_compare, reference, LAYOUTS["pp2"], overlap_grad_reduce=True):
        assert all(value <= TOLERANCE for value in worst.values()), worst


def _collectives(folder: Path, settings: dict[str, Any]) -> list[Collective]:
    with RecordedCollectives() as collectives:
        _compare(folder, settings)
    return collectives.seen


@with_deepstack
@pytest.mark.parametrize("layout", ["cp2-tp2-sp-recompute-selective", "cp2-pp2-recompute-full", "cp2-tp2-vision-data"])
def test_ranks_issue_their_common_collectives_in_one_order(reference: Path, gloo_pool: GlooPool, layout: str) -> None:
    """Otherwise they would wait for each other on GPUs. Some of the ranks have no frames or no responses."""
    issued = gloo_pool.run(_collectives, reference, LAYOUTS[layout])
    for first, second in combinations(range(len(issued)), 2):
        assert in_common(issued[first], second) == in_common(issued[second], first)
    assert all(in_common(issued[0], rank) for rank in (1, 2))


FROZEN = (("vision_tower", "merger"), ("vision_tower",), ("merger",), ("language_model",))
PREFIXES = {
    "vision_tower": ("vision_tower.patch_embed.", "vision_tower.decoder.", "vision_tower.position_embedding"),
    "merger": ("vision_tower.merger.", "vision_tower.deepstack_mergers."),
    "language_model": ("language_model.",),
}


def _gradients_with_frozen_parts(folder: Path, context: int) -> list[dict[str, Tensor | None]]:
    """Return the gradient of each parameter, summed over the context-parallel ranks, for each entry of FROZEN."""
    results = []
    for freeze in FROZEN:
        settings = {"model": {"path": folder / "model", "dtype": "float32", "freeze": freeze}}
        run = RunConfig.model_validate({**settings, "parallel": {"context": context}})
        mesh.initialize(run.parallel)
        config = ModelConfig.from_pretrained(folder / "model")
        model = build_model(config, run.model, run.parallel, run.recompute).train()
        load_model_weights(model, folder / "model")
        batch = pack_for_rank([_group(1, config), _group(0, config)], config)
        model.log_probs(model(batch), batch.target_ids).sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append({name: None if g is None else sum_over_context_ranks(g) for name, g in gradients.items()})
    return results


@pytest.mark.parametrize("reference", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
def test_only_frozen_parts_have_no_gradient_with_and_without_context_parallelism(
    reference: Path, gloo_pool: GlooPool, world: None
) -> None:
    """The only image has one temporal step: three of the four ranks encode nothing, and one has no response."""
    expected = _gradients_with_frozen_parts(reference, context=1)
    for frozen, alone in zip(FROZEN, expected, strict=True):
        prefixes = tuple(prefix for part in frozen for prefix in PREFIXES[part])
        assert all((gradient is None) == name.startswith(prefixes) for name, gradient in alone.items())
    for rank in gloo_pool.run(_gradients_with_frozen_parts, reference, context=4):
        for actual, alone in zip(rank, expected, strict=True):
            largest = max(float(gradient.abs().max()) for gradient in alone.values() if gradient is not None)
            torch.testing.assert_close(actual, alone, atol=TOLERANCE * largest, rtol=0)
