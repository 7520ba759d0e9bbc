"""Tests of the shared memory channel with real shared memory, which other processes open."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from megatron_vcr1.rollout.sglang.channels.shared_memory import SharedMemoryChannel
from megatron_vcr1.rollout.sglang.http import RequestRefused
from tests.limits import HANG_S
from tests.rollout.sglang.channels.test_flat_bucket import shared_files
from tests.rollout.sglang.fake_server import FakeServer


def test_every_rank_of_every_server_can_open_the_memory() -> None:
    with (
        FakeServer(lambda path, body: (200, {"tp_size": 2})) as first,
        FakeServer(lambda path, body: (200, {"tp_size": 2})) as second,
    ):
        channel = SharedMemoryChannel(timeout_s=HANG_S)
        ones = torch.ones(32, dtype=torch.uint8)  # no padding between the tensors
        prepared = channel.prepare([("first", ones), ("second", ones)])
        for server in (first, second):
            channel.send(server.url, prepared)
        bodies = [body for server in (first, second) for _, body in server.requests if body]
    # Each reader closes the memory before the next one opens it.
    reader = (
        "import base64, pickle, sys; "
        "[print(pickle.loads(base64.b64decode(text))['flattened_tensor'].sum().item()) for text in sys.argv[1:]]"
    )
    descriptions = [text for body in bodies for text in body["serialized_named_tensors"]]
    found = subprocess.run([sys.executable, "-c", reader, *descriptions], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["64"] * 4
    assert {body["load_format"] for body in bodies} == {"flattened_bucket"}


def test_memory_that_a_server_did_not_open_is_removed_with_the_bucket() -> None:
    before = shared_files()
    with FakeServer(lambda path, body: (200 if body is None else 400, {"tp_size": 2})) as server:
        channel = SharedMemoryChannel(timeout_s=HANG_S)
        prepared = channel.prepare([("first", torch.ones(3))])
        for _ in range(2):
            with pytest.raises(RequestRefused):
                channel.send(server.url, prepared)
        created = shared_files() - before
        assert created
        del prepared
    assert not created & shared_files()
