"""The planner's traffic against recorded collectives and values computed by hand."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.encoding import EncodedPrompt, VisionInput
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.context_shard import pack_for_rank
from megatron_vcr1.model.presets import model_config
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh, schedule
from megatron_vcr1.planning.job import Job, Layout, square_video
from megatron_vcr1.planning.parameters import stage_parameters
from megatron_vcr1.planning.traffic import boundary_bytes, context_traffic, key_bytes, step_traffic, tensor_traffic
from tests.gloo import GlooPool
from tests.model import tiny

pytestmark = pytest.mark.xdist_group("gloo")

NUM_PARAMETERS_7B = 8_292_166_656
LAYOUTS = {
    "tp2": Layout(tensor=2, replicas=2),
    "tp2-sp": Layout(tensor=2, replicas=2, sequence_parallel=True),
    "tp4-sp-recompute": Layout(tensor=4, sequence_parallel=True, recompute="full"),
    "tp2-pp2": Layout(tensor=2, pipeline=2, sequence_parallel=True),
    "tp2-sp-vision-data": Layout(tensor=2, replicas=2, sequence_parallel=True, vision="data"),
}


class _Recorder(TorchDispatchMode):
    """Records the buffer sizes of all collectives by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            # The whole buffer is the output of a gather and the input of a scatter: take the larger one.
            self.bytes[name] += max(_num_bytes(argument) for argument in args[:2])
        return func(*args, **(kwargs or {}))


def _num_bytes(argument: Any) -> int:
    leaves = torch.utils._pytree.tree_leaves(argument)
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())


def _record(folder: Path, layout: Layout, prompt: Any, responses: Any) -> dict[str, int]:
    """Run forward and backward of one microbatch on this rank; return the bytes of its collectives by kind."""
    settings = {"parallel": layout.parallel, "recompute": layout.recompute_section}
    run = RunConfig.model_validate({"model": {"path": folder, "dtype": "float32"}, **settings})
    mesh.initialize(run.parallel)
    model = build_model(
        ModelConfig.from_pretrained(folder), run.model, run.parallel, run.recompute, initialize_weights=True
    ).train()
    batch = pack_for_rank([Group("a", prompt, responses)], model.model_config, pad_to_multiple_of=layout.tensor)

    def loss(batch: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        return model.log_probs(hidden, batch.target_ids).sum(), {}

    recorder = _Recorder()
    with recorder:
        schedule.forward_backward(model, [batch], loss)
    return dict(recorder.bytes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_predicted_bytes_equal_those_of_the_collectives(name: str, gloo_pool: GlooPool, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    tiny.hf_config("qwen2_5_vl").save_pretrained(tmp_path)
    config = ModelConfig.from_pretrained(tmp_path)
    job = Job(config, prompts_per_step=1, group_size=4, prompt_tokens=256, response_tokens=9, dtype_bytes=4)
    prompt, responses = _group_of(job)
    ranks = gloo_pool.run(_record, tmp_path, layout, prompt, responses)
    ring = (layout.tensor - 1) / layout.tensor
    first_rank_of_stage = range(0, 4, 4 // layout.pipeline)
    for stage, rank in enumerate(first_rank_of_stage):
        recorded = ranks[rank]
        gathers = recorded.get("allgather_base", 0) + recorded.get("reduce_scatter_base", 0)
        sent = ring * (2 * recorded.get("allreduce", 0) + gathers)
        forward, backward = tensor_traffic(job, layout, stage, layout.stages(config)[stage])
        assert forward.bytes + backward.bytes == pytest.approx(sent, rel=0.02), recorded
    if layout.pipeline > 1:
        assert ranks[0]["send"] == pytest.approx(boundary_bytes(job, layout), rel=0.02)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_predicted_bytes_of_context_parallelism_equal_those_of_the_collectives(
    recompute: str, gloo_pool: GlooPool, tmp_path: Path
) -> None:
    layout = Layout(context=4, recompute=recompute)
    tiny.hf_config("qwen2_5_vl").save_pretrained(tmp_path)
    config = ModelConfig.from_pretrained(tmp_path)
    job = Job(config, prompts_per_step=1, group_size=4, prompt_tokens=257, response_tokens=9, dtype_bytes=4)
    ranks = gloo_pool.run(_record, tmp_path, layout, *_group_of(job))
    # 3 ranks' parts of ceil(257 / 4) tokens, keys and values of 2 heads of 8 float32 values.
    assert key_bytes(job, layout) == 3 * 65 * 2 * 2 * 8 * 4
    forward, backward = context_traffic(job, layout, 0, num_layers=4)
    for recorded in ranks:
        keys = 3 / 4 * (recorded["allgather_base"] + recorded["reduce_scatter_base"])
        assert keys == 4 * 3 * key_bytes(job, layout)  # in each of 4 layers, two gathers and a scatter
    features = [recorded["alltoall_base"] for recorded in ranks]  # what a rank sends or receives, its own included
    # Each feature is sent at least once, forward and backward; the last prompt token is a pad, which may go to several
    # ranks. The buffers count the larger of sent and received, so they are an upper bound.
    num_features = 3 * 64
    assert sum(features) >= 2 * num_features * 96 * 4
    predicted = forward.bytes + backward.bytes - 4 * 3 * key_bytes(job, layout)
    assert predicted == pytest.approx(3 / 4 * sum(features) / 4, rel=0.3)


def _group_of(job: Job) -> tuple[EncodedPrompt, tuple[torch.Tensor, ...]]:
    """Create a prompt with the job's video, and its responses."""
    steps, height, width = grid = square_video(job.config, job.prompt_tokens)
    frames = torch.zeros(2 * steps, 14 * height, 14 * width, 3, dtype=torch.uint8)
    video = VisionInput(frames, grid, 1.0)
    pads = torch.full((video.num_tokens(2),), tiny.VIDEO_PAD)
    text = torch.full((job.prompt_tokens - len(pads),), 5)
    return EncodedPrompt(torch.cat((text, pads)), (video,)), tiny.responses((job.response_tokens,) * job.group_size, 1)


def test_traffic_of_replicas_and_stages_equals_a_calculation_by_hand() -> None:
    job = Job(model_config("qwen2.5-vl-7b"), prompts_per_step=8)
    alone = step_traffic(job, Layout())
    assert alone.tensor == alone.pipeline == alone.data == 0
    assert alone.sync == 2 * NUM_PARAMETERS_7B
    replicas = step_traffic(job, Layout(replicas=8))
    (whole,) = stage_parameters(job.config, Layout())
    assert replicas.data == pytest.approx(7 / 8 * whole.total * (4 + 2))  # with the padding of the vision tower's MLPs
    frozen = step_traffic(dataclasses.replace(job, freeze=("vision_tower",)), Layout(replicas=8))
    assert frozen.data == pytest.approx(7 / 8 * (whole.text + whole.embedding) * (4 + 2)) and frozen.sync == alone.sync
    tokens = 3840 + 8 * 199
    stages = step_traffic(job, Layout(pipeline=2, replicas=4))
    assert stages.pipeline == 2 * 2 * tokens * 3584 * 2  # 2 microbatches per replica, for policy and reference
    assert step_traffic(job, Layout(pipeline=4, replicas=2)).pipeline == 4 * 3 * tokens * 3584 * 2
    several = dataclasses.replace(job, num_passes=3, num_minibatches=2)  # 6 updates, and the old log-probs
    assert step_traffic(several, Layout(replicas=8)).data == pytest.approx(6 * replicas.data)
    assert step_traffic(several, Layout(pipeline=2, replicas=4)).pipeline == 2 * (3 + 2) * tokens * 3584 * 2
