"""Groups dealt to replicas by FLOPs: the assignment, and the exchange between real processes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.parallel import mesh
from megatron_vcr1.training.grpo.balance import deal_by_work
from megatron_vcr1.training.grpo.batch import PolicyGroup
from tests.gloo import GlooPool
from tests.model import tiny


def _group(index: int, num_response_tokens: int) -> PolicyGroup:
    prompt = tiny.prompt("tv", seed=index)
    response = torch.full((num_response_tokens,), index)
    return PolicyGroup(f"sample-{index}", prompt, (response,), (1.0,), ((-0.5,) * num_response_tokens,))


def _is_intact(group: PolicyGroup) -> bool:
    expected = _group(int(group.id.split("-")[1]), len(group.responses[0]))
    tensors = [
        (each.prompt.token_ids, each.responses[0], *(item.frames for item in each.prompt.vision))
        for each in (group, expected)
    ]
    return group.rollout_log_probs == expected.rollout_log_probs and all(map(torch.equal, *tensors))


def _deal(folder: Path, lengths: list[list[int]], pipeline: int) -> tuple[list[str], float, float]:
    """Deal groups of the given response lengths, by replica; return the ids that this rank has afterwards."""
    mesh.initialize(ParallelSection(pipeline=pipeline))
    replica = mesh.replica_index()
    first = sum(map(len, lengths[:replica]))
    groups = [_group(first + offset, length) for offset, length in enumerate(lengths[replica])]
    dealt = deal_by_work(groups, ModelConfig.from_pretrained(folder), frozen_parts=())
    assert all(map(_is_intact, dealt.groups))
    return [group.id for group in dealt.groups], dealt.imbalance_before, dealt.imbalance


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("balance")
    tiny.hf_config("qwen2_5_vl").save_pretrained(folder)
    return folder


@pytest.mark.xdist_group("gloo")
def test_ranks_of_a_replica_have_the_same_groups_after_the_exchange(gloo_pool: GlooPool, folder: Path) -> None:
    lengths = [[2000, 1500, 900], [3, 4]]
    results = gloo_pool.run(_deal, folder, lengths, pipeline=2)
    by_replica = {tuple(ids) for ids, _, _ in results}
    assert len(by_replica) == 2 and sorted(itertools.chain(*by_replica)) == [f"sample-{index}" for index in range(5)]
    ((before, after),) = {(before, after) for _, before, after in results}
    assert before > 1.8 and after < 1.2


@pytest.mark.xdist_group("gloo")
def test_groups_travel_between_four_replicas(gloo_pool: GlooPool, folder: Path) -> None:
    lengths = [[500, 400, 300, 200], [], [3], [100, 450]]
    results = gloo_pool.run(_deal, folder, lengths, pipeline=1)
    assert sorted(id for ids, _, _ in results for id in ids) == [f"sample-{index}" for index in range(7)]
    assert results[0][2] < results[0][1] / 1.5


@pytest.mark.xdist_group("gloo")
def test_balanced_groups_stay_where_they_are(gloo_pool: GlooPool, folder: Path) -> None:
    results = gloo_pool.run(_deal, folder, [[10, 10], [10, 10]], pipeline=2)
    assert {tuple(ids) for ids, _, _ in results} == {("sample-0", "sample-1"), ("sample-2", "sample-3")}
