"""The planner's seconds: pipeline formulas, FLOPs per stage, and how the update scales."""

from __future__ import annotations

import dataclasses
import math

import pytest

from megatron_vcr1.model.flops import forward_flops
from megatron_vcr1.model.presets import model_config
from megatron_vcr1.planning.devices import DEVICES, Device, Efficiency
from megatron_vcr1.planning.job import Job, Layout
from megatron_vcr1.planning.memory import EngineMemory
from megatron_vcr1.planning.parameters import stage_parameters
from megatron_vcr1.planning.timing import (
    SCORES_RECOMPUTED,
    Pass,
    busiest_seconds,
    old_log_prob_seconds,
    pipeline_bubble,
    pipeline_seconds,
    reference_seconds,
    seconds_of_stage,
    stage_seconds,
    step_seconds,
    update_seconds,
    useful_flops,
)
from megatron_vcr1.planning.traffic import context_traffic, data_traffic, key_bytes


def test_pipeline_formulas() -> None:
    assert pipeline_seconds([1.0, 1.0, 1.0, 1.0], 4) == 7.0
    assert busiest_seconds([1.0, 3.0], 4) == 12.0
    assert pipeline_bubble([1.0, 1.0, 1.0, 1.0], 4) == pytest.approx(3 / 7)  # (p - 1) / (m + p - 1)
    assert pipeline_bubble([1.0], 3) == 0.0
    assert pipeline_bubble([2.0, 1.0], 10) == pytest.approx(1 - 15 / 21)


def test_the_last_layer_computes_only_target_tokens_after_its_attention() -> None:
    """On a device with 1 FLOP/s, seconds are FLOPs."""
    job = Job(model_config("qwen2.5-vl-7b"))
    tokens, targets = 3840 + 8 * 199, 8 * 200
    exact = Efficiency(1, 1, 1, 1, 1, 1, 1)
    unit = dataclasses.replace(DEVICES["h100"], microbatch_overhead_s=0.0, flops_per_s=1.0, efficiency=exact)
    layout = Layout(pipeline=2)
    first, second = (seconds_of_stage(job, layout, unit, stage, 14, Pass.FORWARD) for stage in (0, 1))
    work = forward_flops(job.config, job.groups(1))
    assert first + second == pytest.approx(work.total)
    saved = 2 * (tokens - targets) * (3584 * 3584 + 3 * 3584 * 18944)  # output projection and MLP
    others = work.head + work.text_attention / 2
    assert second - others == pytest.approx((work.text_layers + saved) / 2 - saved)


def test_context_parallelism_divides_the_work_and_sends_more_between_nodes() -> None:
    job = Job(model_config("qwen2.5-vl-7b"), prompt_tokens=65_536)
    device = dataclasses.replace(DEVICES["h100"], microbatch_overhead_s=0, collective_latency_s=0)
    (alone,) = stage_seconds(job, Layout(), device, Pass.TRAINING)
    (split,) = stage_seconds(job, Layout(context=4), device, Pass.TRAINING)
    assert alone / 4 < split < 1.05 * alone / 4  # the rest of the time: keys and values
    small_nodes = dataclasses.replace(device, gpus_per_node=2)
    (between_nodes,) = stage_seconds(job, Layout(context=4), small_nodes, Pass.TRAINING)
    sent = sum(traffic.bytes for traffic in context_traffic(job, Layout(context=4), 0, 28))
    keys = 3 * 28 * key_bytes(job, Layout(context=4))  # two gathers and a reduce-scatter
    network = device.network_bytes_per_s * device.efficiency.network
    link = device.link_bytes_per_s * device.efficiency.link
    seen = sent - 3 / 4 * keys  # three of four chunks overlap with attention
    assert between_nodes - split == pytest.approx(seen / network - seen / link)
    slow = dataclasses.replace(small_nodes, network_bytes_per_s=device.network_bytes_per_s / 1000)
    (waiting,) = stage_seconds(job, Layout(context=4), slow, Pass.TRAINING)
    attention = forward_flops(job.config, job.groups(1)).text_attention * Layout(context=4).token_share(job)
    hiding = 3 / 4 * (1 + 2 + SCORES_RECOMPUTED) * attention / device.flops_per_s / device.efficiency.attention
    assert waiting - split == pytest.approx(1000 * sent / network - hiding - seen / link)


def test_update_seconds_grow_with_recomputation_prompts_and_network_traffic() -> None:
    job, device = Job(model_config("qwen2.5-vl-7b")), DEVICES["h100"]
    layout = Layout(tensor=2, replicas=4, sequence_parallel=True)
    base = update_seconds(job, layout, device)
    assert update_seconds(job, dataclasses.replace(layout, recompute="full"), device) > 1.2 * base
    twice = dataclasses.replace(job, prompts_per_step=16)
    assert 1.5 * base < update_seconds(twice, layout, device) < 2 * base
    assert useful_flops(twice) == 2 * useful_flops(job)
    small_nodes = dataclasses.replace(device, gpus_per_node=2)
    assert update_seconds(job, layout, small_nodes) > base  # the replicas are on different nodes


def test_several_updates_per_rollout_add_passes_and_the_old_log_probs() -> None:
    """On a device that sends and updates for nothing, seconds are those of the passes."""
    free = {"memory_bytes_per_s": math.inf, "link_bytes_per_s": math.inf, "host_bytes_per_s": math.inf}
    device = dataclasses.replace(DEVICES["h100"], **free, microbatch_overhead_s=0.0)
    layout = Layout(replicas=2)
    once = Job(model_config("qwen2.5-vl-7b"), prompts_per_step=8)
    several = dataclasses.replace(once, num_passes=3, num_minibatches=2)
    assert (once.num_updates, several.num_updates) == (1, 6)
    assert [layout.num_microbatches(job) for job in (once, several)] == [4, 2]
    assert update_seconds(several, layout, device) == pytest.approx(3 * update_seconds(once, layout, device))
    reference = reference_seconds(once, layout, device)
    assert old_log_prob_seconds(once, layout, device) == 0
    assert reference_seconds(several, layout, device) == pytest.approx(reference)
    assert old_log_prob_seconds(several, layout, device) == pytest.approx(reference)
    assert useful_flops(several) == pytest.approx(
        3 * useful_flops(once) - forward_flops(once.config, once.groups(8)).total
    )
    # Vision features are kept: the old log-probs compute them if there is no reference, and nothing else does.
    kept = [dataclasses.replace(several, freeze=("vision_tower", "merger"), with_reference=on) for on in (True, False)]
    before = reference_seconds(kept[0], layout, device), old_log_prob_seconds(kept[1], layout, device)
    assert before[0] == pytest.approx(before[1]) and old_log_prob_seconds(kept[0], layout, device) < 0.95 * before[1]
    work = forward_flops(once.config, once.groups(8))
    assert useful_flops(kept[0]) - useful_flops(kept[1]) == pytest.approx(work.total - work.vision)


def test_a_minibatch_with_fewer_groups_than_replicas_takes_the_time_of_one_group() -> None:
    job = Job(model_config("qwen2.5-vl-7b"), prompts_per_step=8, num_minibatches=4)
    layout = Layout(replicas=8)
    assert layout.groups_per_update(job) == layout.num_microbatches(job) == 1
    engine = EngineMemory(1, 1e9, 1e9, 10**6)
    whole = step_seconds(dataclasses.replace(job, num_minibatches=1), layout, DEVICES["h100"], engine, 500)
    parts = step_seconds(job, layout, DEVICES["h100"], engine, 500)
    assert 3.5 * whole.update < parts.update < 4.5 * whole.update


def test_the_backward_pass_hides_the_reduction_of_gradients() -> None:
    """Between nodes: a fast network is hidden completely, a slow one but for the time of the backward pass."""
    job, layout = Job(model_config("qwen2.5-vl-7b")), Layout(replicas=8)
    overlapped = dataclasses.replace(job, overlaps_reduction=True)
    device = dataclasses.replace(DEVICES["h100"], microbatch_overhead_s=0.0)
    reduced, _ = data_traffic(job, layout)
    for network_bytes_per_s, is_hidden in ((1e12, True), (1e9, False)):
        slow = dataclasses.replace(device, network_bytes_per_s=network_bytes_per_s, gpus_per_node=1)
        seconds = [update_seconds(each, layout, slow) for each in (job, overlapped)]
        reduction = reduced / (network_bytes_per_s * device.efficiency.network)
        (forward,), (both,) = (stage_seconds(job, layout, slow, each) for each in (Pass.FORWARD, Pass.TRAINING))
        assert seconds[0] - seconds[1] == pytest.approx(reduction if is_hidden else both - forward)


def test_the_optimizer_updates_only_trained_parameters() -> None:
    """On a device that computes and sends for nothing, the update takes the optimizer's time alone.

    State in host memory is copied to the device and back.
    """
    free = {"flops_per_s": math.inf, "link_bytes_per_s": math.inf, "network_bytes_per_s": math.inf}
    device = dataclasses.replace(DEVICES["h100"], **free, microbatch_overhead_s=0.0, collective_latency_s=0.0)
    job = Job(model_config("qwen2.5-vl-7b"))
    (whole,) = stage_parameters(job.config, Layout())
    in_host = dataclasses.replace(job, optimizer_resident=False)
    resident, copied = (update_seconds(each, Layout(replicas=8), device) for each in (job, in_host))
    assert copied - resident == pytest.approx(2 * 12 * whole.total / 8 / 50e9)
    frozen = dataclasses.replace(job, freeze=("vision_tower",))
    both = [update_seconds(each, Layout(replicas=8), device) for each in (job, frozen)]
    assert both[1] / both[0] == pytest.approx((whole.text + whole.embedding) / whole.total)


def test_the_reference_in_host_memory_costs_a_copy_of_the_trained_parameters() -> None:
    job, device, layout = Job(model_config("qwen2.5-vl-7b")), DEVICES["h100"], Layout(tensor=2)
    (stage,) = stage_parameters(job.config, layout)

    def copy_seconds(job: Job, device: Device, imbalance: float = 1.0) -> float:
        jobs = (job, dataclasses.replace(job, reference_resident=True))
        in_host, resident = (reference_seconds(each, layout, device, imbalance=imbalance) for each in jobs)
        return in_host - resident

    assert copy_seconds(job, device) == pytest.approx(2 * stage.total / 50e9)
    assert copy_seconds(job, device, imbalance=2.0) == pytest.approx(2 * stage.total / 50e9)  # the same on all replicas
    frozen = dataclasses.replace(job, freeze=("vision_tower",))
    assert copy_seconds(frozen, device) == pytest.approx(2 * (stage.text + stage.embedding) / 50e9)
    assert copy_seconds(job, DEVICES["cpu"]) == 0
