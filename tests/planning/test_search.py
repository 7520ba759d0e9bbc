"""The layouts that the planner finds, and its reasons for those that cannot run."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_vcr1.model.presets import model_config
from megatron_vcr1.planning.devices import DEVICES, Cluster
from megatron_vcr1.planning.job import Job, Layout
from megatron_vcr1.planning.memory import training_memory
from megatron_vcr1.planning.report import settings
from megatron_vcr1.planning.search import Plan, Refusal, balanced, best_variant, evaluate, search
from megatron_vcr1.planning.timing import Pass, stage_seconds

H100 = DEVICES["h100"]


def test_search_finds_the_papers_run_and_gives_reasons_for_the_rest() -> None:
    job = Job(model_config("qwen2.5-vl-7b"))
    plans, refusals = search(job, Cluster(H100, 8), longest_response=500)
    assert job.num_steps == 2254
    assert [plan.time.total for plan in plans] == sorted(plan.time.total for plan in plans)
    for plan in plans:
        assert plan.peak_bytes <= 80e9 and plan.layout.num_gpus == 8
        assert plan.layout.replicas * plan.layout.tensor * plan.layout.pipeline == 8
        assert 0 < plan.mfu < plan.update_mfu < 1
        assert plan.gpu_hours == pytest.approx(plan.time.total * 2254 * 8 / 3600)
    (eight,) = (refusal for refusal in refusals if (refusal.tensor, refusal.pipeline) == (8, 1))
    assert "28 attention heads" in eight.reason


def test_long_prompts_are_split_across_ranks_where_that_helps() -> None:
    job = Job(model_config("qwen2.5-vl-7b"), prompt_tokens=131_072, prompts_per_step=8)
    found = best_variant(job, Cluster(H100, 8), 2, 1, longest_response=500)
    assert isinstance(found, Plan) and found.layout.context > 1 and found.layout.num_gpus == 8
    assert settings(found)["parallel.context"] == found.layout.context
    assert found.traffic.context > 0
    alone = evaluate(job, Layout(tensor=2, replicas=4, sequence_parallel=True, recompute="full"), Cluster(H100, 8), 500)
    assert isinstance(alone, Refusal)  # without context parallelism, it does not fit
    short = best_variant(Job(job.config), Cluster(H100, 8), 2, 1, longest_response=500)
    assert isinstance(short, Plan) and short.layout.context == 1 and "parallel.context" not in settings(short)


def test_a_refusal_names_missing_memory_or_indivisible_prompts() -> None:
    job = Job(model_config("qwen2.5-vl-72b"))
    found = best_variant(job, Cluster(H100, 8), 1, 1, longest_response=500)
    assert isinstance(found, Refusal) and "GB of 80" in found.reason and "even with recomputation" in found.reason
    assert found.needed_bytes is not None and found.needed_bytes > 80e9
    job = Job(model_config("qwen2.5-vl-7b"), prompts_per_step=4)
    found = best_variant(job, Cluster(H100, 8), 1, 1, longest_response=500)
    assert isinstance(found, Refusal) and "4 prompts per step are not a multiple of 8 replicas" in found.reason
    assert isinstance(best_variant(job, Cluster(H100, 8), 2, 1, longest_response=500), Plan)


def test_a_layout_is_refused_without_a_word_about_other_layouts() -> None:
    job = Job(model_config("qwen2.5-vl-7b"))
    found = evaluate(job, Layout(replicas=8), Cluster(H100, 8), longest_response=500)
    assert isinstance(found, Refusal) and "training needs" in found.reason and "recomputation" not in found.reason


def test_a_missing_engine_counts_before_missing_memory() -> None:
    """With full recomputation training fits, and only the engine does not: more recomputation is no help."""
    job = Job(model_config("qwen2.5-vl-7b"), prompts_per_step=4)
    memory = training_memory(job, Layout(tensor=4, sequence_parallel=True, recompute="full"), H100)
    needed = max(stage.total for stage in memory)
    found = best_variant(job, Cluster(dataclasses.replace(H100, memory_bytes=1.001 * needed), 4), 4, 1, 10**7)
    assert isinstance(found, Refusal) and "no room for an engine" in found.reason and found.needed_bytes is not None
    assert found.needed_bytes > 4 * needed


def test_balancing_moves_layers_away_from_the_stage_with_the_vision_tower() -> None:
    job = Job(model_config("qwen2.5-vl-7b"))
    even = Layout(pipeline=4, replicas=2)
    better = balanced(job, even, Cluster(H100, 8))
    stages = better.stages(job.config)
    assert stages[0] < 7 and sum(stages) == 28
    slowest = [max(stage_seconds(job, layout, H100, Pass.TRAINING)) for layout in (even, better)]
    assert slowest[1] < slowest[0]
    for first in range(1, 26, 3):  # no other size of the first stage alone is better
        other = dataclasses.replace(even, first_stage_layers=first)
        assert max(stage_seconds(job, other, H100, Pass.TRAINING)) >= slowest[1] * 0.999
