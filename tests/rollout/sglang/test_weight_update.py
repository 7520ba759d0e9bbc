"""Tests of weight updates: buckets, the order of the calls to a server, and servers that fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_vcr1.rollout.sglang.channels.base import NamedTensors
from megatron_vcr1.rollout.sglang.memory import WEIGHTS_ONLY
from megatron_vcr1.rollout.sglang.weight_update import WeightUpdate, split_into_buckets
from tests.limits import HANG_S
from tests.rollout.sglang.fake_server import FakeServer, Reply


@pytest.mark.parametrize(
    "sizes, expected",
    [([], []), ([3], [[3]]), ([2, 2, 2], [[2, 2], [2]]), ([1, 9, 1], [[1], [9], [1]]), ([4, 1], [[4], [1]])],
)
def test_buckets_hold_as_many_tensors_as_fit(sizes: list[int], expected: list[list[int]]) -> None:
    tensors = [(str(index), torch.zeros(size, dtype=torch.uint8)) for index, size in enumerate(sizes)]
    found = list(split_into_buckets(tensors, 4))
    assert [[len(tensor) for _, tensor in bucket] for bucket in found] == expected
    assert [name for bucket in found for name, _ in bucket] == [name for name, _ in tensors]


class Recorder:
    """A channel that sends nothing; `fails` is called before each send."""

    def __init__(self, fails: Any = lambda url: None) -> None:
        self.sent: list[str] = []
        self.aborted: list[str] = []
        self.fails = fails

    def begin(self, url: str) -> None: ...

    def prepare(self, bucket: NamedTensors) -> NamedTensors:
        return bucket

    def send(self, url: str, prepared: NamedTensors) -> None:
        self.fails(url)
        self.sent.append(url)

    def finish(self, url: str) -> None: ...

    def abort(self, url: str) -> None:
        self.aborted.append(url)


class Versioned:
    """A server that stores its weight version; `reports` is a version that it reports instead."""

    def __init__(self, reports: str | None = None) -> None:
        self.version = "default"
        self.reports = reports

    def __call__(self, path: str, body: Any) -> Reply:
        if path == "/update_weight_version":
            self.version = body["new_version"]
        return 200, {"weight_version": self.reports or self.version}


BUCKET = [("w", torch.zeros(1))]


def test_the_calls_to_a_server_are_in_order() -> None:
    with FakeServer(Versioned()) as server:
        channel = Recorder()
        update = WeightUpdate([server.url], "2@run", channel, timeout_s=HANG_S)
        assert server.requests[-1] == ("/update_weight_version", {"new_version": "loading", "abort_all_requests": True})
        update.send(BUCKET)
        update.finish()
        assert (update.current, update.failed) == ([server.url], {})
        paths = [path for path, _ in server.requests]
        assert paths.index("/pause_generation") < paths.index("/update_weight_version") < paths.index("/flush_cache")
        assert paths[-2:] == ["/continue_generation", "/model_info"]


def test_a_server_that_fails_is_excluded_and_stays_marked() -> None:
    good, bad = Versioned(), Versioned()
    with FakeServer(good) as server, FakeServer(bad) as failing:

        def fails(url: str) -> None:
            if url == failing.url:
                raise RuntimeError("connection closed by peer")

        channel = Recorder(fails)
        update = WeightUpdate([server.url, failing.url], "2@run", channel, timeout_s=HANG_S)
        update.send(BUCKET)
        update.send(BUCKET)
        update.finish()
        assert update.current == [server.url]
        assert update.failed == {failing.url: "connection closed by peer"}
        assert (channel.sent, channel.aborted) == ([server.url] * 2, [failing.url])
        assert (good.version, bad.version) == ("2@run", "loading")
        assert [each.count("/pause_generation") for each in (server, failing)] == [1, 1]
        assert [each.count("/continue_generation") for each in (server, failing)] == [1, 1]  # no server stays paused


def test_a_server_with_memory_for_its_weights_only_stays_paused_and_marked() -> None:
    behavior, refusing = Versioned(), Versioned()
    behavior.version = refusing.version = f"{WEIGHTS_ONLY}1@run"
    with (
        FakeServer(behavior) as server,
        FakeServer(refusing) as failing,
        FakeServer(Versioned("released:1")) as released,
    ):

        def fails(url: str) -> None:
            if url == failing.url:
                raise RuntimeError("out of memory")

        update = WeightUpdate([server.url, failing.url, released.url], "2@run", Recorder(fails), timeout_s=HANG_S)
        assert behavior.version == f"{WEIGHTS_ONLY}loading"
        update.send(BUCKET)
        update.finish()
        assert update.current == [server.url]
        assert (behavior.version, refusing.version) == (f"{WEIGHTS_ONLY}2@run", f"{WEIGHTS_ONLY}loading")
        assert [each.count("/continue_generation") for each in (server, failing)] == [0, 0]
        assert update.failed[released.url] == f"{released.url}: the memory of its weights is released"


def test_a_version_that_did_not_arrive_is_detected() -> None:
    with FakeServer(Versioned(reports="1@run")) as server:
        update = WeightUpdate([server.url], "2@run", Recorder(), timeout_s=HANG_S)
        update.finish()
        assert update.current == []
        assert "reports weights '1@run' after an update to '2@run'" in update.failed[server.url]


def test_a_full_disk_excludes_all_servers_without_an_error() -> None:
    class Full(Recorder):
        def prepare(self, bucket: NamedTensors) -> NamedTensors:
            raise OSError(28, "No space left on device")

    with FakeServer(Versioned()) as server:
        channel = Full()
        update = WeightUpdate([server.url], "2@run", channel, timeout_s=HANG_S)
        update.send(BUCKET)
        update.send(BUCKET)
        assert channel.aborted == [server.url]
        assert "No space left" in update.failed[server.url]
