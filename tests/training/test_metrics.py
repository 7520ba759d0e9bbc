from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.config.model_sections import ParallelSection, RecomputeSection
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.flops import Workload, forward_flops, recomputed_flops, training_flops
from megatron_vcr1.model.packed_batch import pack
from megatron_vcr1.parallel import mesh
from megatron_vcr1.training.metrics import Metrics, add_forward_work, add_update_work, peak_memory_gb, throughput
from megatron_vcr1.training.microbatches import Microbatch
from tests.gloo import GlooPool
from tests.model import tiny


@pytest.fixture
def world() -> Iterator[None]:
    with mesh.world(ParallelSection()):
        yield


def test_means_sums_maxima_and_times_of_one_rank(world: None) -> None:
    metrics = Metrics()
    metrics.add_to_mean("kl", 3.0, 2)
    metrics.add_to_mean("kl", 5.0, 2)
    metrics.add_to_mean("no values", 0.0, 0)
    metrics.add_to_sum("dropped", 2)
    metrics.add_to_sum("dropped")
    metrics.update_max("longest", -3)
    metrics.update_max("longest", -5)
    with metrics.time_phase("update"):
        time.sleep(0.01)
    row = metrics.reduce()
    assert (row["kl"], row["dropped"], row["longest"]) == (2.0, 3, -3)
    assert "no values" not in row
    assert row["time/update_s"] >= 0.01 and row["time/rollout_s"] == 0


def _reduce_on_a_rank() -> dict[str, float]:
    mesh.initialize(ParallelSection())
    rank = mesh.replica_index()
    metrics = Metrics()
    metrics.add_to_mean("mean", 10.0 * rank, rank)
    metrics.add_to_sum("number", rank)
    metrics.update_max("largest", -rank)
    metrics.add_seconds("total", rank)
    if rank == 2:
        metrics.add_to_sum("rank 2 only")
    return metrics.reduce()


@pytest.mark.xdist_group("gloo")
def test_every_rank_gets_the_metrics_of_all_ranks(gloo_pool: GlooPool) -> None:
    for row in gloo_pool.run(_reduce_on_a_rank):
        assert (row["mean"], row["number"], row["largest"], row["rank 2 only"]) == (10.0, 6, 0, 1)
        assert row["time/total_s"] == 3  # the slowest rank


def test_tokens_flops_and_throughput_of_an_update(world: None, tmp_path: Path) -> None:
    tiny.create("qwen2_5_vl", tmp_path)
    config = ModelConfig.from_pretrained(tmp_path)
    group = Group("g", tiny.prompt("v", seed=0), tiny.responses((4, 6), seed=1))
    batch = Microbatch(pack([group], config))
    metrics = Metrics()
    recompute = RecomputeSection(granularity="full")
    add_update_work(metrics, [batch, batch], config, frozen_parts=("vision_tower",), recompute=recompute)
    add_forward_work(metrics, "reference", [batch], config)
    row: dict[str, Any] = metrics.reduce()
    assert row["tokens"] == 2 * (len(group.prompt.token_ids) + 3 + 5)
    work = Workload.of_batch(config, batch.packed)
    assert row["model_flops"] == pytest.approx(2 * training_flops(config, work, freeze=("vision_tower",)).total)
    recomputed = 2 * recomputed_flops(config, work, recompute, freeze=("vision_tower",)).total
    assert row["hardware_flops"] == pytest.approx(row["model_flops"] + recomputed)
    row |= {"time/total_s": 4.0, "time/update_s": 2.0, "time/reference_s": 0.5}
    rates = throughput(row, 8, "NVIDIA H100 80GB HBM3")
    assert rates["tokens_per_s"] == row["tokens"] / 4
    assert rates["tflops_per_s"] == pytest.approx(row["model_flops"] / 2 / 8 / 1e12)
    assert rates["mfu"] == pytest.approx(rates["tflops_per_s"] * 1e12 / 989.4e12)
    assert rates["mfu_hardware"] == pytest.approx(rates["mfu"] * row["hardware_flops"] / row["model_flops"])
    assert rates["mfu/reference"] == pytest.approx(forward_flops(config, work).total / 0.5 / 8 / 989.4e12)
    assert "mfu/old_log_probs" not in rates
    assert set(throughput(row, 8, None)) == {"tokens_per_s", "tflops_per_s"}


def test_peak_memory_is_in_gigabytes() -> None:
    assert 0.01 < peak_memory_gb() < 1000
