"""Tests of the placement of servers: GPUs, owners, channels, and what colocated servers exclude."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_vcr1.config.rollout_sections import SglangSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.rollout.placement import Placement, assign_servers


def placement(num_gpus: int = 8, **settings: Any) -> Placement:
    return replace(Placement.from_section(SglangSection(**settings)), num_gpus=num_gpus)


def test_gpus_are_counted_only_if_cuda_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for is_available, expected in ((True, 4), (False, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_available=is_available: is_available)
        assert Placement.from_section(SglangSection()).num_gpus == expected


@pytest.mark.parametrize(
    "num_gpus, colocated, expected",
    [(8, True, [0, 2]), (8, False, [4, 6]), (0, True, None), (0, False, None)],
)
def test_separate_servers_use_the_gpus_after_those_of_training(
    num_gpus: int, colocated: bool, expected: list[int] | None
) -> None:
    placed = placement(num_gpus, num_servers=2, tensor=2, colocated=colocated)
    assert placed.server_gpus(num_training_ranks=4) == expected


@pytest.mark.parametrize(
    "settings, replicas_of_ranks, expected",
    [
        ({"num_servers": 4}, [0, 0, 1, 1], [0, 0, 1, 1]),
        ({"num_servers": 2, "tensor": 2}, [0, 1, 0, 1], None),  # each server on the GPUs of two replicas
        ({"num_servers": 4, "tensor": 2}, [0, 0, 1, 1, 0, 0, 1, 1], [0, 1, 0, 1]),  # two pipeline stages
        ({"num_servers": 2, "tensor": 2}, [0, 0], None),  # GPUs without ranks
        ({"num_servers": 2, "colocated": False}, [0, 0], None),
    ],
)
def test_colocated_servers_are_on_the_gpus_of_a_replica(
    settings: dict[str, Any], replicas_of_ranks: list[int], expected: list[int] | None
) -> None:
    assert placement(8, **settings).replicas_of_servers(replicas_of_ranks) == expected


def test_too_few_gpus_are_an_error() -> None:
    separate = placement(8, num_servers=2, tensor=2, colocated=False)
    with pytest.raises(UserError, match=r"sglang\.num_servers: 2 servers of sglang\.tensor = 2 need GPUs 5 to 8"):
        separate.server_gpus(num_training_ranks=5)


@pytest.mark.parametrize(
    "num_gpus, weight_sync, releasing, expected",
    [
        (8, "broadcast", ["a"], "tensor"),  # NCCL cannot connect two processes of one GPU
        (8, "broadcast", [], "broadcast"),
        (0, "broadcast", ["a"], "broadcast"),  # gloo can
        (8, "disk", ["a"], "disk"),
    ],
)
def test_servers_on_the_gpus_of_training_get_weights_by_shared_memory(
    num_gpus: int, weight_sync: str, releasing: list[str], expected: str
) -> None:
    assert placement(num_gpus, weight_sync=weight_sync).weight_channel(releasing) == expected


def test_backends_and_memory_follow_the_machine() -> None:
    assert (placement(8).broadcast_backend, placement(0).broadcast_backend) == ("nccl", "gloo")
    assert placement(8).shares_gpu_memory
    assert not (placement(0).shares_gpu_memory or placement(8, colocated=False).shares_gpu_memory)
    assert placement(8).may_share_gpu_memory and not placement(8, weight_sync="tensor").may_share_gpu_memory
    assert not (placement(0).may_share_gpu_memory or placement(8, urls=["http://a"]).may_share_gpu_memory)
    assert placement(colocated=False).samples_while_training and not placement().samples_while_training


def test_colocated_servers_need_a_replica_each() -> None:
    placement().check_sharing(2, 2)
    with pytest.raises(UserError, match="3 replicas share 2 servers"):
        placement().check_sharing(3, 2)


@pytest.mark.parametrize("num_servers, num_replicas", [(1, 1), (3, 2), (2, 2), (2, 5), (8, 3)])
def test_every_server_has_one_owner_and_every_replica_a_server(num_servers: int, num_replicas: int) -> None:
    urls, replicas = [f"http://host:{index}" for index in range(num_servers)], list(range(num_replicas))
    assigned = [assign_servers(urls, replicas, replica) for replica in replicas]
    assert sorted(url for _, owned in assigned for url in owned) == urls
    assert all(used and set(owned) <= set(used) for used, owned in assigned)
