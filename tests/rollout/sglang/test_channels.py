"""How tensors reach a server: real shared memory, and real process groups of gloo, whose other side fails."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from megatron_vcr1.rollout.sglang.channels import BroadcastChannel, SharedMemoryChannel
from megatron_vcr1.rollout.sglang.weight_sync import WeightUpdate
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
        self.dies = self.hangs = False
        self.refuses = ""
        self.end = threading.Event()
        self.peers: list[subprocess.Popen[str]] = []

    def __call__(self, path: str, body: Any) -> Reply:
        if path == self.refuses:
            return 400, {"message": "no"}
        if path == "/init_weights_update_group":
            command = [sys.executable, "-c", PEER, body["master_address"], str(body["master_port"]), body["group_name"]]
            self.peers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            self._expect("joined")
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
