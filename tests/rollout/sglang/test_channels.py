"""How tensors reach a server: real shared memory, and real process groups of gloo, whose other side fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _new_process_group_helper, _world

from megatron_vcr1.rollout.sglang import channels
from megatron_vcr1.rollout.sglang.channels import SHARED_MEMORY, BroadcastChannel, SharedMemoryChannel
from megatron_vcr1.rollout.sglang.http import RequestRefused
from megatron_vcr1.rollout.sglang.weight_sync import LIVENESS_S, WeightUpdate
from tests.rollout.sglang.fake_server import FakeServer, Reply

# A server's rank: joins the group as SGLang does, says so, takes a tensor of ones for each line that it reads.
PEER = """
import sys
from datetime import timedelta
import torch, torch.distributed as dist
from torch.distributed.distributed_c10d import _new_process_group_helper
address, port, name = sys.argv[1:]
store = dist.PrefixStore(name, dist.TCPStore(address, int(port), 2, is_master=False))
patience = timedelta(seconds=60)
group, _ = _new_process_group_helper(2, 1, [], dist.Backend("gloo"), store, group_name=name, timeout=patience)
options = dist.BroadcastOptions()
options.rootRank, options.rootTensor = 0, 0
print("joined", flush=True)
for line in sys.stdin:
    tensor = torch.zeros(int(line))
    group.broadcast([tensor], options).wait()
    assert tensor.min() == 1
    print("loaded", flush=True)
"""


class Server:
    """Loads what it is sent, by a process of its own; the attributes say what it does instead."""

    def __init__(self) -> None:
        self.dies = self.hangs = self.joins_late = False
        self.is_left = False
        self.refuses = ""
        self.end = threading.Event()
        self.peers: list[subprocess.Popen[str]] = []

    def __call__(self, path: str, body: Any) -> Reply:
        if path == self.refuses:
            return 400, {"message": "no"}
        if path == "/init_weights_update_group":
            command = [sys.executable, "-c", PEER, body["master_address"], str(body["master_port"]), body["group_name"]]
            self.peers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            if self.joins_late:
                return 400, {"message": "no"}
            self._expect("joined")
        if path == "/destroy_weights_update_group":
            self.is_left = True
        if path == "/update_weights_from_distributed":
            if self.dies:
                self.peers[-1].kill()
                return 502, {"error": "the scheduler is gone"}
            if self.hangs:
                self.end.wait(60)
            for (size,) in body["shapes"]:
                self.peers[-1].stdin.write(f"{size}\n")  # type: ignore[union-attr]
                self.peers[-1].stdin.flush()  # type: ignore[union-attr]
                self._expect("loaded")
        return 200, {"tp_size": 1, "weight_version": "default"}

    def _expect(self, word: str) -> None:
        assert self.peers[-1].stdout is not None and self.peers[-1].stdout.readline().strip() == word


@pytest.fixture
def server() -> Iterator[tuple[Server, str]]:
    behaviour = Server()
    with FakeServer(behaviour) as http:
        yield behaviour, http.url
        behaviour.end.set()
    for peer in behaviour.peers:
        peer.kill()
        peer.communicate()


BUCKET = [("first", torch.ones(3)), ("second", torch.ones(1_000_000))]


def test_a_broadcast_arrives_and_nothing_is_left_of_its_group(server: tuple[Server, str]) -> None:
    _, url = server
    channel = BroadcastChannel(timeout_s=60)
    channel.begin(url)
    for _ in range(2):
        channel.send(url, channel.prepare(BUCKET))
    channel.finish(url)
    assert not _world.pg_map


@pytest.fixture(params=["connected", "connecting"])
def first_broadcast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gloo connects its ranks when a group is made; NCCL in the first broadcast, which waits for all of them."""
    if request.param == "connecting":
        monkeypatch.setattr(dist.ProcessGroup, "broadcast", lambda *_: threading.Event().wait(600))


def test_a_server_that_dies_ends_a_broadcast(server: tuple[Server, str], first_broadcast: None) -> None:
    behaviour, url = server
    update = WeightUpdate([url], "2@run", BroadcastChannel(timeout_s=600), timeout_s=60)
    behaviour.dies = True
    update.send(BUCKET)
    assert url in update.failed
    assert not _world.pg_map


def test_a_server_that_hangs_ends_a_broadcast_in_time(server: tuple[Server, str], first_broadcast: None) -> None:
    behaviour, url = server
    channel = BroadcastChannel(timeout_s=60)
    update = WeightUpdate([url], "2@run", channel, timeout_s=60)
    behaviour.hangs, channel._groups[url].timeout_s = True, 0.5
    update.send(BUCKET)
    assert url in update.failed
    assert not _world.pg_map


def test_a_server_that_does_not_take_tensors_leaves_no_group(server: tuple[Server, str]) -> None:
    behaviour, url = server
    behaviour.refuses = "/begin_weight_update"
    update = WeightUpdate([url], "2@run", BroadcastChannel(timeout_s=60), timeout_s=60)
    assert "status 400" in update.failed[url]
    assert not _world.pg_map


def test_a_server_that_joins_after_it_has_refused_leaves_no_group(server: tuple[Server, str]) -> None:
    behaviour, url = server
    behaviour.joins_late = True
    update = WeightUpdate([url], "2@run", BroadcastChannel(timeout_s=60), timeout_s=60)
    assert "status 400" in update.failed[url]
    behaviour._expect("joined")
    deadline = time.monotonic() + 60
    while not (destroyed := behaviour.is_left) or _world.pg_map:
        assert time.monotonic() < deadline, f"the server's side is left: {destroyed}"
        time.sleep(0.01)


def test_nccl_leaves_a_lost_server_to_the_channel(server: tuple[Server, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its watchdog would end the process, unless told not to when the group is made, and before its time limit."""
    _, url = server
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    made = []

    def make(size: int, rank: int, ranks: list[int], backend: str, *rest: Any, timeout: timedelta, **more: Any) -> Any:
        made.append((backend, os.environ.get(name), timeout.total_seconds() > 60 + LIVENESS_S))
        return _new_process_group_helper(size, rank, ranks, dist.Backend("gloo"), *rest, timeout=timeout, **more)

    monkeypatch.setattr(channels, "_new_process_group_helper", make)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(name, "3")
    channel = BroadcastChannel(timeout_s=60)
    channel.begin(url)
    channel.abandon(url)
    assert made == [("nccl", "0", True)]
    assert os.environ[name] == "3"


def test_shared_memory_lasts_for_every_rank_of_every_server() -> None:
    with (
        FakeServer(lambda path, body: (200, {"tp_size": 2})) as one,
        FakeServer(lambda path, body: (200, {"tp_size": 2})) as other,
    ):
        channel = SharedMemoryChannel(timeout_s=5)
        prepared = channel.prepare([("first", torch.ones(3)), ("second", torch.ones(5))])
        for server in (one, other):
            channel.send(server.url, prepared)
        bodies = [body for server in (one, other) for _, body in server.requests if body]
    # One after another: each has forgotten the memory before the next one opens it.
    reader = (
        "import base64, pickle, sys; [print(pickle.loads(base64.b64decode(one))[1][1].sum()) for one in sys.argv[1:]]"
    )
    descriptions = [text for body in bodies for text in body["serialized_named_tensors"]]
    found = subprocess.run([sys.executable, "-c", reader, *descriptions], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["tensor(5.)"] * 4


def test_shared_memory_that_a_server_did_not_open_goes_with_the_bucket() -> None:
    before = set(SHARED_MEMORY.glob("torch_*"))
    with FakeServer(lambda path, body: (200 if body is None else 400, {"tp_size": 2})) as server:
        channel = SharedMemoryChannel(timeout_s=5)
        prepared = channel.prepare([("first", torch.ones(3))])
        for _ in range(2):
            with pytest.raises(RequestRefused):
                channel.send(server.url, prepared)
        assert set(SHARED_MEMORY.glob("torch_*")) != before
        del prepared
    assert set(SHARED_MEMORY.glob("torch_*")) == before


def test_a_bucket_that_shared_memory_has_no_room_for_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not a SIGBUS, as soon as it is written to."""
    usage = shutil.disk_usage(SHARED_MEMORY)._replace(free=96)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    channel = SharedMemoryChannel(timeout_s=5)
    channel.prepare([("small", torch.zeros(24))])
    with pytest.raises(OSError, match=r"no room for sglang.weight_sync_bucket_mb of weights: '/dev/shm'"):
        channel.prepare([("large", torch.zeros(25))])
