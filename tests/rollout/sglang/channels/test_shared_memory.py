"""Tests of the shared memory channel with real shared memory, which other processes open."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch

from megatron_vcr1.rollout.sglang.channels.shared_memory import SHARED_MEMORY, SharedMemoryChannel
from megatron_vcr1.rollout.sglang.http import RequestRefused
from tests.rollout.sglang.fake_server import FakeServer


def test_every_rank_of_every_server_can_open_the_memory() -> None:
    with (
        FakeServer(lambda path, body: (200, {"tp_size": 2})) as first,
        FakeServer(lambda path, body: (200, {"tp_size": 2})) as second,
    ):
        channel = SharedMemoryChannel(timeout_s=5)
        prepared = channel.prepare([("first", torch.ones(3)), ("second", torch.ones(5))])
        for server in (first, second):
            channel.send(server.url, prepared)
        bodies = [body for server in (first, second) for _, body in server.requests if body]
    # Each reader closes the memory before the next one opens it.
    reader = (
        "import base64, pickle, sys; [print(pickle.loads(base64.b64decode(text))[1][1].sum()) for text in sys.argv[1:]]"
    )
    descriptions = [text for body in bodies for text in body["serialized_named_tensors"]]
    found = subprocess.run([sys.executable, "-c", reader, *descriptions], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["tensor(5.)"] * 4


def test_memory_that_a_server_did_not_open_is_removed_with_the_bucket() -> None:
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


def test_a_bucket_without_room_in_shared_memory_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check, the first write would end the process with SIGBUS."""
    usage = shutil.disk_usage(SHARED_MEMORY)._replace(free=96)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    channel = SharedMemoryChannel(timeout_s=5)
    channel.prepare([("small", torch.zeros(24))])
    with pytest.raises(OSError, match=r"no room for sglang.weight_sync_bucket_mb of weights; lower it: '/dev/shm'"):
        channel.prepare([("large", torch.zeros(25))])
