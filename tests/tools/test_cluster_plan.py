"""The planner's arithmetic against megatron-core's models, values by hand, and recorded collectives."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from cluster_plan.devices import DEVICES, Efficiency
from cluster_plan.job import Job, Layout, square_video
from cluster_plan.memory import cache_bytes_per_token, training_memory
from cluster_plan.parameters import num_parameters, stage_parameters
from cluster_plan.search import Cluster, Plan, Refusal, balanced, best_variant, search
from cluster_plan.timing import (
    pipeline_bubble,
    pipeline_seconds,
    seconds_of_stage,
    stage_seconds,
    update_seconds,
    useful_flops,
)
from cluster_plan.traffic import boundary_bytes, step_traffic, tensor_traffic
from model_presets import PRESETS, model_config
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.encoding import EncodedPrompt, VisionInput
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.flops import forward_flops
from megatron_vcr1.model.packed_batch import pack
from megatron_vcr1.model.qwen_vl import build_model
from megatron_vcr1.parallel import mesh, schedule
from tests.gloo import GlooPool
from tests.model import tiny

pytestmark = pytest.mark.xdist_group("gloo")

SEVEN_BILLION = 8_292_166_656


def _gloo_layouts() -> list[Layout]:
    return [
        Layout(tensor=2, copies=2, sequence_parallel=True),
        Layout(pipeline=4),
        Layout(tensor=2, pipeline=2, first_stage_layers=1, sequence_parallel=True),
        Layout(tensor=4),
    ]


def _built_parameters(folder: Path, layout: Layout) -> tuple[int, int]:
    """Pipeline stage and parameters of this rank's model."""
    run = RunConfig.model_validate({"model": {"path": folder, "dtype": "float32"}, "parallel": layout.parallel})
    mesh.initialize(run.parallel)
    model = build_model(ModelConfig.from_pretrained(folder), run)
    from megatron.core import parallel_state

    num_parameters = sum(one.numel() for one in model.parameters())
    return parallel_state.get_pipeline_model_parallel_rank(), num_parameters


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("layout", _gloo_layouts(), ids=str)
def test_every_rank_holds_what_megatron_builds(
    family: str, layout: Layout, gloo_pool: GlooPool, tmp_path: Path
) -> None:
    tiny.hf_config(family).save_pretrained(tmp_path)
    config = ModelConfig.from_pretrained(tmp_path)
    expected = stage_parameters(config, layout)
    for stage, built in gloo_pool.run(_built_parameters, tmp_path, layout):
        assert expected[stage].total == built


def test_the_seven_billion_model_is_what_megatron_builds(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["qwen2.5-vl-7b"]))
    run = RunConfig.model_validate({"model": {"path": tmp_path}})
    with mesh.world(run.parallel), torch.device("meta"):
        model = build_model(ModelConfig.from_pretrained(tmp_path), run)
    assert sum(one.numel() for one in model.parameters()) == SEVEN_BILLION
    config = model_config("qwen2.5-vl-7b")
    assert num_parameters(config) == stage_parameters(config, Layout())[0].total == SEVEN_BILLION


class _Recorder(TorchDispatchMode):
    """Bytes of the buffers of every collective that starts, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            # Of gathers and scatters, the whole buffer: the output of one, the input of the other.
            self.bytes[name] += max(_num_bytes(argument) for argument in args[:2])
        return func(*args, **(kwargs or {}))


def _num_bytes(argument: Any) -> int:
    leaves = torch.utils._pytree.tree_leaves(argument)
    return sum(one.nbytes for one in leaves if isinstance(one, torch.Tensor) and one.is_floating_point())


def _recorded(folder: Path, layout: Layout, prompt: Any, responses: Any) -> dict[str, int]:
    settings = {"parallel": layout.parallel, "recompute": layout.recompute_section}
    run = RunConfig.model_validate({"model": {"path": folder, "dtype": "float32"}, **settings})
    mesh.initialize(run.parallel)
    model = build_model(ModelConfig.from_pretrained(folder), run, initialize_weights=True).train()
    batch = pack([Group("a", prompt, responses)], model.model_config, pad_to_multiple_of=layout.tensor)

    def loss(batch: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        return model.log_probs(hidden, batch.target_ids).sum(), {}

    recorder = _Recorder()
    with recorder:
        schedule.forward_backward(model, [batch], loss)
    return dict(recorder.bytes)


RECORDED_LAYOUTS = {
    "tp2": Layout(tensor=2, copies=2),
    "tp2-sp": Layout(tensor=2, copies=2, sequence_parallel=True),
    "tp4-sp-recompute": Layout(tensor=4, sequence_parallel=True, recompute="full"),
    "tp2-pp2": Layout(tensor=2, pipeline=2, sequence_parallel=True),
}


@pytest.mark.parametrize("name", RECORDED_LAYOUTS)
def test_bytes_sent_are_those_of_the_collectives(name: str, gloo_pool: GlooPool, tmp_path: Path) -> None:
    layout = RECORDED_LAYOUTS[name]
    tiny.hf_config("qwen2_5_vl").save_pretrained(tmp_path)
    config = ModelConfig.from_pretrained(tmp_path)
    job = Job(config, prompts_per_step=1, group_size=4, prompt_tokens=256, response_tokens=9, dtype_bytes=4)
    prompt, responses = _group_of(job)
    every = gloo_pool.run(_recorded, tmp_path, layout, prompt, responses)
    ring = (layout.tensor - 1) / layout.tensor
    first_rank_of_stage = range(0, 4, 4 // layout.pipeline)
    for stage, rank in enumerate(first_rank_of_stage):
        recorded = every[rank]
        gathers = recorded.get("allgather_base", 0) + recorded.get("reduce_scatter_base", 0)
        sent = ring * (2 * recorded.get("allreduce", 0) + gathers)
        forward, backward = tensor_traffic(job, layout, stage, layout.stages(config)[stage])
        assert forward.bytes + backward.bytes == pytest.approx(sent, rel=0.02), recorded
    if layout.pipeline > 1:
        assert every[0]["send"] == pytest.approx(boundary_bytes(job, layout), rel=0.02)


def _group_of(job: Job) -> tuple[EncodedPrompt, tuple[torch.Tensor, ...]]:
    """A prompt with the job's video, and its responses."""
    steps, height, width = grid = square_video(job.config, job.prompt_tokens)
    frames = torch.zeros(2 * steps, 14 * height, 14 * width, 3, dtype=torch.uint8)
    video = VisionInput(frames, grid, 1.0)
    pads = torch.full((video.num_tokens(2),), tiny.VIDEO_PAD)
    text = torch.full((job.prompt_tokens - len(pads),), 5)
    return EncodedPrompt(torch.cat((text, pads)), (video,)), tiny.responses((job.response_tokens,) * job.group_size, 1)


def test_pure_numbers() -> None:
    assert square_video(model_config("qwen2.5-vl-7b"), 1024) == (15, 16, 16)
    assert square_video(model_config("qwen2.5-vl-7b"), 3840) == (19, 28, 28)
    assert pipeline_seconds([1.0, 1.0, 1.0, 1.0], 4) == 7.0
    assert pipeline_bubble([1.0, 1.0, 1.0, 1.0], 4) == pytest.approx(3 / 7)  # (p - 1) / (m + p - 1)
    assert pipeline_bubble([1.0], 3) == 0.0
    assert pipeline_bubble([2.0, 1.0], 10) == pytest.approx(1 - 15 / 21)


def test_memory_of_the_seven_billion_model_by_hand() -> None:
    """bfloat16 weights, float32 gradients, 12 bytes of optimizer a number divided over the copies."""
    job = Job(model_config("qwen2.5-vl-7b"))
    (memory,) = training_memory(job, Layout(copies=8, recompute="full"), DEVICES["h100"])
    assert memory.parameters == 2 * SEVEN_BILLION
    assert memory.gradients == 4 * SEVEN_BILLION
    assert memory.optimizer == 12 * SEVEN_BILLION / 8
    assert memory.reference == 0
    rows, patches = 3840 + 8 * 199, 19 * 28 * 28
    # A row's residual stream in 28 layers, a patch's in 32, and 4 hidden sizes in the merger.
    kept = rows * 28 * 3584 + patches * (32 * 1280 + 4 * 1280)
    assert memory.activations == pytest.approx(2 * kept)
    (resident,) = training_memory(dataclasses.replace(job, reference_resident=True), Layout(copies=8), DEVICES["h100"])
    assert resident.reference == 2 * SEVEN_BILLION
    (frozen,) = training_memory(dataclasses.replace(job, freeze=("vision_tower",)), Layout(copies=8), DEVICES["h100"])
    assert 0.6e9 < (memory.gradients - frozen.gradients) / 4 < 0.7e9  # the tower


def test_the_last_layer_keeps_and_computes_few_rows_behind_its_attention() -> None:
    job = Job(model_config("qwen2.5-vl-7b"))
    rows, targets, behind = 3840 + 8 * 199, 8 * 200, 2 * 3584 + 2 * 18944
    whole, last = (
        training_memory(job, Layout(tensor=1, pipeline=2, copies=4), DEVICES["h100"])[stage] for stage in (0, 1)
    )
    a_layer = 4 * 3584 + 2 * 3584 + 2 * 512 + 2 * 18944
    assert last.activations == pytest.approx(2 * (rows * 14 * a_layer - (rows - targets) * behind))
    assert whole.activations > 2 * 2 * rows * 14 * a_layer  # of two microbatches, with the vision tower's
    exact = Efficiency(1, 1, 1, 1, 1, 1, 1)
    unit = dataclasses.replace(DEVICES["h100"], microbatch_s=0.0, flops_per_s=1.0, efficiency=exact)
    layout = Layout(pipeline=2)
    first, second = (seconds_of_stage(job, layout, unit, stage, 14, training=False) for stage in (0, 1))
    work = forward_flops(job.config, job.groups(1))
    assert first + second == pytest.approx(work.total)
    spared = 2 * (rows - targets) * (3584 * 3584 + 3 * 3584 * 18944)  # in output projection and MLP
    others = work.head + work.text_attention / 2
    assert second - others == pytest.approx((work.text_layers + spared) / 2 - spared)


def test_cache_bytes_of_a_token() -> None:
    job = Job(model_config("qwen2.5-vl-7b"))
    assert cache_bytes_per_token(job, 1) == 2 * 28 * 4 * 128 * 2
    assert cache_bytes_per_token(job, 8) == 2 * 28 * 1 * 128 * 2  # fewer heads than ranks: one each


def test_traffic_of_copies_and_stages_by_hand() -> None:
    job = Job(model_config("qwen2.5-vl-7b"), prompts_per_step=8)
    alone = step_traffic(job, Layout())
    assert alone.tensor == alone.pipeline == alone.data == 0
    assert alone.sync == 2 * SEVEN_BILLION
    copies = step_traffic(job, Layout(copies=8))
    assert copies.data == pytest.approx(7 / 8 * SEVEN_BILLION * (4 + 2))
    rows = 3840 + 8 * 199
    stages = step_traffic(job, Layout(pipeline=2, copies=4))
    assert stages.pipeline == 2 * 2 * rows * 3584 * 2  # 2 microbatches a copy, once for each model
    assert step_traffic(job, Layout(pipeline=4, copies=2)).pipeline == 4 * 3 * rows * 3584 * 2


def test_a_balanced_first_stage_gives_layers_to_the_others() -> None:
    job, device = Job(model_config("qwen2.5-vl-7b")), DEVICES["h100"]
    even = Layout(pipeline=4, copies=2)
    better = balanced(job, even, device)
    stages = better.stages(job.config)
    assert stages[0] < 7 and sum(stages) == 28
    slowest = [max(stage_seconds(job, layout, device, training=True)) for layout in (even, better)]
    assert slowest[1] < slowest[0]
    for first in range(1, 26, 3):  # no other first stage alone is better
        other = dataclasses.replace(even, first_stage_layers=first)
        assert max(stage_seconds(job, other, device, training=True)) >= slowest[1] * 0.999


def test_seconds_grow_as_they_must() -> None:
    job, device = Job(model_config("qwen2.5-vl-7b")), DEVICES["h100"]
    layout = Layout(tensor=2, copies=4, sequence_parallel=True)
    base = update_seconds(job, layout, device, 8)
    assert update_seconds(job, dataclasses.replace(layout, recompute="full"), device, 8) > 1.2 * base
    twice = dataclasses.replace(job, prompts_per_step=16)
    assert 1.5 * base < update_seconds(twice, layout, device, 8) < 2 * base
    assert useful_flops(twice) == 2 * useful_flops(job)
    assert update_seconds(job, layout, device, 2) > base  # copies in different nodes


def test_search_finds_the_papers_run_and_says_why_others_cannot() -> None:
    job = Job(model_config("qwen2.5-vl-7b"))
    plans, refusals = search(job, Cluster(DEVICES["h100"], 8), longest_response=500)
    assert job.num_steps == 2254
    assert [plan.time.total for plan in plans] == sorted(plan.time.total for plan in plans)
    for plan in plans:
        assert plan.peak_bytes <= 80e9 and plan.layout.num_gpus == 8
        assert plan.layout.copies * plan.layout.tensor * plan.layout.pipeline == 8
        assert 0 < plan.utilisation < plan.update_utilisation < 1
        assert plan.gpu_hours == pytest.approx(plan.time.total * 2254 * 8 / 3600)
    (eight,) = (one for one in refusals if (one.tensor, one.pipeline) == (8, 1))
    assert "28 attention heads" in eight.reason


def test_reasons() -> None:
    h100 = DEVICES["h100"]
    job = Job(model_config("qwen2.5-vl-72b"))
    found = best_variant(job, Cluster(h100, 8), 1, 1, longest_response=500)
    assert isinstance(found, Refusal) and "GB of 80" in found.reason
    job = Job(model_config("qwen2.5-vl-7b"), prompts_per_step=4)
    found = best_variant(job, Cluster(h100, 8), 1, 1, longest_response=500)
    assert isinstance(found, Refusal) and "4 prompts a step do not divide among 8 copies" in found.reason
    assert isinstance(best_variant(job, Cluster(h100, 8), 2, 1, longest_response=500), Plan)
