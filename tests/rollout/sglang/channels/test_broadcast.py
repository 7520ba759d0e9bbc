"""Tests of the broadcast channel with real gloo process groups, whose other side fails in various ways."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _new_process_group_helper, _world

from megatron_vcr1.rollout.sglang.channels import broadcast
from megatron_vcr1.rollout.sglang.channels.base import LIVENESS_TIMEOUT_S
from megatron_vcr1.rollout.sglang.channels.broadcast import BroadcastChannel
from megatron_vcr1.rollout.sglang.weight_update import WeightUpdate
from tests.limits import HANG_S
from tests.rollout.sglang.fake_server import FakeServer, Reply

# A rank of a server: it joins the group as SGLang does, prints that, and receives a tensor of ones per line of input.
PEER = """
import sys
from datetime import timedelta
import torch, torch.distributed as dist
from torch.distributed.distributed_c10d import _new_process_group_helper
address, port, name = sys.argv[1:]
store = dist.PrefixStore(name, dist.TCPStore(address, int(port), 2, is_master=False))
timeout = timedelta(seconds=600)
group, _ = _new_process_group_helper(2, 1, [], dist.Backend("gloo"), store, group_name=name, timeout=timeout)
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
    """A server that receives tensors in a process of its own; its attributes select a fault."""

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
                self.end.wait(HANG_S)
            for (size,) in body["shapes"]:
                self.peers[-1].stdin.write(f"{size}\n")  # type: ignore[union-attr]
                self.peers[-1].stdin.flush()  # type: ignore[union-attr]
                self._expect("loaded")
        return 200, {"tp_size": 1, "weight_version": "default"}

    def _expect(self, word: str) -> None:
        assert self.peers[-1].stdout is not None and self.peers[-1].stdout.readline().strip() == word


@pytest.fixture
def server() -> Iterator[tuple[Server, str]]:
    behavior = Server()
    with FakeServer(behavior) as http:
        yield behavior, http.url
        behavior.end.set()
    for peer in behavior.peers:
        peer.kill()
        peer.communicate()


BUCKET = [("first", torch.ones(3)), ("second", torch.ones(1_000_000))]


def test_tensors_arrive_and_the_group_is_removed(server: tuple[Server, str]) -> None:
    _, url = server
    channel = BroadcastChannel("gloo", timeout_s=HANG_S)
    channel.begin(url)
    for _ in range(2):
        channel.send(url, channel.prepare(BUCKET))
    channel.finish(url)
    assert not _world.pg_map


@pytest.fixture(params=["connected", "connecting"])
def first_broadcast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate NCCL, too: gloo connects its ranks when a group is created, NCCL in the first broadcast, which waits."""
    if request.param == "connecting":
        monkeypatch.setattr(dist.ProcessGroup, "broadcast", lambda *_: threading.Event().wait(600))


def test_a_server_that_dies_ends_the_broadcast(server: tuple[Server, str], first_broadcast: None) -> None:
    behavior, url = server
    update = WeightUpdate([url], "2@run", BroadcastChannel("gloo", timeout_s=HANG_S), timeout_s=HANG_S)
    behavior.dies = True
    update.send(BUCKET)
    assert url in update.failed
    assert not _world.pg_map


def test_a_server_that_hangs_ends_the_broadcast_after_the_timeout(
    server: tuple[Server, str], first_broadcast: None
) -> None:
    behavior, url = server
    channel = BroadcastChannel("gloo", timeout_s=HANG_S)
    update = WeightUpdate([url], "2@run", channel, timeout_s=HANG_S)
    behavior.hangs, channel._groups[url].timeout_s = True, 0.5
    update.send(BUCKET)
    assert url in update.failed
    assert not _world.pg_map


def test_no_group_is_left_if_the_server_refuses_the_update(server: tuple[Server, str]) -> None:
    behavior, url = server
    behavior.refuses = "/begin_weight_update"
    update = WeightUpdate([url], "2@run", BroadcastChannel("gloo", timeout_s=HANG_S), timeout_s=HANG_S)
    assert "status 400" in update.failed[url]
    assert not _world.pg_map


def test_no_group_is_left_if_the_server_joins_after_an_error(server: tuple[Server, str]) -> None:
    behavior, url = server
    behavior.joins_late = True
    update = WeightUpdate([url], "2@run", BroadcastChannel("gloo", timeout_s=HANG_S), timeout_s=HANG_S)
    assert "status 400" in update.failed[url]
    behavior._expect("joined")
    deadline = time.monotonic() + HANG_S
    while not (destroyed := behavior.is_left) or _world.pg_map:
        assert time.monotonic() < deadline, f"the server's side is left: {destroyed}"
        time.sleep(0.01)


def test_nccl_does_not_end_the_process_if_a_server_is_lost(
    server: tuple[Server, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL's watchdog would, unless the variable is set when the group is created and its timeout is never reached."""
    _, url = server
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    created = []

    def create(
        size: int, rank: int, ranks: list[int], backend: str, *rest: Any, timeout: timedelta, **more: Any
    ) -> Any:
        created.append((backend, os.environ.get(name), timeout.total_seconds() > HANG_S + LIVENESS_TIMEOUT_S))
        return _new_process_group_helper(size, rank, ranks, dist.Backend("gloo"), *rest, timeout=timeout, **more)

    monkeypatch.setattr(broadcast, "_new_process_group_helper", create)
    monkeypatch.setenv(name, "3")
    channel = BroadcastChannel("nccl", timeout_s=HANG_S)
    channel.begin(url)
    channel.abort(url)
    assert created == [("nccl", "0", True)]
    assert os.environ[name] == "3"


def test_the_store_listens_on_one_address_only() -> None:
    """The store takes commands from everybody who reaches it, so it must not listen on all interfaces."""

    def listening() -> set[tuple[str, int]]:
        connections = psutil.Process().net_connections(kind="inet")
        return {tuple(connection.laddr) for connection in connections if connection.status == psutil.CONN_LISTEN}

    before = listening()
    store = broadcast._open_store("127.0.0.1", 1, HANG_S)
    opened = {("127.0.0.1", store.port)}
    assert listening() - before == opened
    client = dist.TCPStore("127.0.0.1", store.port, 1, is_master=False)
    client.set("key", "value")
    assert store.get("key") == b"value"
    del client, store
    assert not listening() & opened
