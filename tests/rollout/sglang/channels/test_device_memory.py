"""Tests of the channel of device memory with four ranks, with memory of the CPU in place of GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.config.rollout_sections import SglangSection
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.placement import Placement
from megatron_vcr1.rollout.sglang import weight_sync
from megatron_vcr1.rollout.sglang.channels import flat_bucket
from megatron_vcr1.rollout.sglang.channels.device_memory import DeviceMemoryChannel
from megatron_vcr1.rollout.sglang.fleet import Fleet
from megatron_vcr1.rollout.sglang.weight_sync import WeightSync, find_device_channel
from tests.gloo import GlooPool
from tests.limits import HANG_S
from tests.rollout.sglang.channels.test_flat_bucket import open_bucket, shared_files
from tests.rollout.sglang.fake_server import FakeServer, Reply

pytestmark = pytest.mark.xdist_group("gloo")


class Receiver:
    """A server that reads what it gets; it refuses all buckets from a given one on."""

    def __init__(self, refused_from: int = 99) -> None:
        self.version = "default"
        self.refused_from = refused_from
        self.buckets: list[list[list[float]]] = []  # by bucket and tensor-parallel rank

    def __call__(self, path: str, body: Any) -> Reply:
        if path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/update_weights_from_tensor":
            assert body["load_format"] == "flattened_bucket"
            read = [open_bucket(description) for description in body["serialized_named_tensors"]]
            if len(self.buckets) >= self.refused_from:
                return 400, {"message": "out of memory"}
            self.buckets.append([[tensor.sum().item() for _, tensor in rank] for rank in read])
        return 200, {"weight_version": self.version, "tp_size": 2}


def _sync(
    folder: Path, server_gpus: Mapping[str, Sequence[str]], parallel: ParallelSection, full_rank: int | None
) -> tuple[tuple[str, ...], bool]:
    """Sync three buckets, of which every rank's copy holds the rank's number; the GPU of rank r is "gpu r"."""
    mesh.initialize(parallel)
    rank, is_leader = dist.get_rank(), mesh.is_replica_leader()
    urls = tuple(server_gpus) if is_leader and mesh.replica_index() == 0 else ()
    section = SglangSection(weight_sync="tensor")
    fleet = Fleet(urls, False, urls, None, is_leader, "job", Placement.from_section(section))
    device = DeviceMemoryChannel(f"gpu {rank}", {url: server_gpus[url] for url in urls}, timeout_s=HANG_S)
    sync = WeightSync(fleet, section, folder, folder, device)
    if rank == full_rank:
        flat_bucket._allocate = _no_room
    try:
        if is_leader:
            sync.begin("1@job")
        for index in range(3):
            sync.send([("a", torch.full((5,), float(rank))), ("b", torch.full((1,), float(index)))])
        return (sync.current if is_leader and sync.end() else ()), device._copy is None
    finally:
        flat_bucket._allocate = ALLOCATE


ALLOCATE = flat_bucket._allocate


def _no_room(num_bytes: int, device: torch.device) -> torch.Tensor:
    raise RuntimeError("no room")


@pytest.mark.parametrize("parallel", [{"tensor": 4}, {"tensor": 2, "pipeline": 2}], ids=str)
def test_each_process_of_a_server_reads_the_memory_of_its_gpu(
    tmp_path: Path, gloo_pool: GlooPool, parallel: dict[str, int]
) -> None:
    good, bad = Receiver(), Receiver(refused_from=1)
    with FakeServer(good) as server, FakeServer(bad) as failing:
        gpus = {server.url: ["gpu 1", "gpu 0"], failing.url: ["gpu 2", "gpu 3"]}
        results = gloo_pool.run(_sync, tmp_path, gpus, ParallelSection(**parallel), None)
        # The second server is asked for two of three buckets, and the ranks on its GPUs share no third one.
        assert failing.count("/update_weights_from_tensor") == 2
    assert results[0] == ((server.url,), True)
    assert all(has_freed for _, has_freed in results)
    assert good.buckets == [[[5.0, index], [0.0, index]] for index in (0.0, 1.0, 2.0)]
    assert bad.buckets == [[[10.0, 0.0], [15.0, 0.0]]]
    assert (good.version, bad.version) == ("1@job", "loading")


def test_a_rank_without_room_for_a_bucket_excludes_the_servers(tmp_path: Path, gloo_pool: GlooPool) -> None:
    receiver = Receiver()
    before = gloo_pool.run(shared_files)
    with FakeServer(receiver) as server:
        gpus = {server.url: ["gpu 0", "gpu 3"]}
        results = gloo_pool.run(_sync, tmp_path, gpus, ParallelSection(tensor=4), full_rank=3)
        assert server.count("/update_weights_from_tensor") == 0
    assert results == [((), True)] * 4  # nobody waits for ever
    assert gloo_pool.run(shared_files) == before


def _find_channel(first_gpu: int, unshareable_rank: int | None) -> tuple[str, dict[str, Sequence[str]]] | None:
    """Look for the channel of one replica of four ranks, with a server of two processes from a GPU on."""
    mesh.initialize(ParallelSection(tensor=2, pipeline=2))
    rank = dist.get_rank()
    fleet = SimpleNamespace(
        placement=SimpleNamespace(may_share_gpu_memory=True), urls=("server",) if mesh.is_replica_leader() else ()
    )
    info = {"base_gpu_id": first_gpu, "tp_size": 2}
    with (
        mock.patch.object(weight_sync, "shareable_gpu", lambda: None if rank == unshareable_rank else f"gpu {rank}"),
        mock.patch.object(weight_sync, "gpu_uuid", lambda index: f"gpu {index}"),
        mock.patch.object(weight_sync, "server_info", lambda url, timeout_s: info),
    ):
        channel = find_device_channel(fleet, SglangSection())  # type: ignore[arg-type]
    return None if channel is None else (channel._gpu, dict(channel._server_gpus))


@pytest.mark.parametrize(
    "first_gpu, unshareable_rank, is_found",
    [(2, None, True), (2, 1, False), (3, None, False)],
    ids=["own GPUs", "a rank that cannot share", "a GPU without a rank"],
)
def test_the_channel_is_used_if_every_server_process_is_on_the_gpu_of_a_rank(
    gloo_pool: GlooPool, first_gpu: int, unshareable_rank: int | None, is_found: bool
) -> None:
    found = gloo_pool.run(_find_channel, first_gpu, unshareable_rank)
    if not is_found:
        assert found == [None] * 4
        return
    assert [channel[0] for channel in found] == [f"gpu {rank}" for rank in range(4)]
    assert all(channel[1] == {"server": ["gpu 2", "gpu 3"]} for channel in found)
