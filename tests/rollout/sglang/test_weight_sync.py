from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_vcr1.rollout.sglang.weight_sync import NamedTensors, WeightUpdate, buckets
from tests.rollout.sglang.fake_server import FakeServer, Reply


@pytest.mark.parametrize(
    "sizes, expected",
    [([], []), ([3], [[3]]), ([2, 2, 2], [[2, 2], [2]]), ([1, 9, 1], [[1], [9], [1]]), ([4, 1], [[4], [1]])],
)
def test_buckets_hold_what_fits(sizes: list[int], expected: list[list[int]]) -> None:
    tensors = [(str(index), torch.zeros(size, dtype=torch.uint8)) for index, size in enumerate(sizes)]
    found = list(buckets(tensors, 4))
    assert [[len(tensor) for _, tensor in bucket] for bucket in found] == expected
    assert [name for bucket in found for name, _ in bucket] == [name for name, _ in tensors]


class Recorder:
    """A channel that sends nothing; `fails` is called before each send."""

    def __init__(self, fails: Any = lambda url: None) -> None:
        self.sent: list[str] = []
        self.abandoned: list[str] = []
        self.fails = fails

    def begin(self, url: str) -> None: ...

    def prepare(self, bucket: NamedTensors) -> NamedTensors:
        return bucket

    def send(self, url: str, prepared: NamedTensors) -> None:
        self.fails(url)
        self.sent.append(url)

    def finish(self, url: str) -> None: ...

    def abandon(self, url: str) -> None:
        self.abandoned.append(url)


class Versioned:
    """What a server does with its version; `lies` reports another."""

    def __init__(self, lies: str | None = None) -> None:
        self.version = "default"
        self.lies = lies

    def __call__(self, path: str, body: Any) -> Reply:
        if path == "/update_weight_version":
            self.version = body["new_version"]
        return 200, {"weight_version": self.lies or self.version}


BUCKET = [("w", torch.zeros(1))]


def test_a_server_is_paused_marked_filled_and_checked() -> None:
    with FakeServer(Versioned()) as server:
        channel = Recorder()
        update = WeightUpdate([server.url], "2@run", channel, timeout_s=5)
        assert server.requests[-1] == ("/update_weight_version", {"new_version": "loading", "abort_all_requests": True})
        update.send(BUCKET)
        update.finish()
        assert (update.current, update.failed) == ([server.url], {})
        paths = [path for path, _ in server.requests]
        assert paths.index("/pause_generation") < paths.index("/update_weight_version") < paths.index("/flush_cache")
        assert paths[-2:] == ["/continue_generation", "/model_info"]


def test_a_server_that_fails_is_left_out_and_keeps_no_version() -> None:
    good, bad = Versioned(), Versioned()
    with FakeServer(good) as one, FakeServer(bad) as other:

        def fails(url: str) -> None:
            if url == other.url:
                raise RuntimeError("connection closed by peer")

        channel = Recorder(fails)
        update = WeightUpdate([one.url, other.url], "2@run", channel, timeout_s=5)
        update.send(BUCKET)
        update.send(BUCKET)
        update.finish()
        assert update.current == [one.url]
        assert update.failed == {other.url: "connection closed by peer"}
        assert (channel.sent, channel.abandoned) == ([one.url] * 2, [other.url])
        assert (good.version, bad.version) == ("2@run", "loading")
        assert [server.count("/pause_generation") for server in (one, other)] == [1, 1]
        assert [server.count("/continue_generation") for server in (one, other)] == [1, 1]  # neither stays paused


def test_a_version_that_did_not_arrive_is_noticed() -> None:
    with FakeServer(Versioned(lies="1@run")) as server:
        update = WeightUpdate([server.url], "2@run", Recorder(), timeout_s=5)
        update.finish()
        assert update.current == []
        assert "reports weights '1@run' after an update to '2@run'" in update.failed[server.url]


def test_a_full_disk_fails_all_servers_and_the_stream_goes_on() -> None:
    class Full(Recorder):
        def prepare(self, bucket: NamedTensors) -> NamedTensors:
            raise OSError(28, "No space left on device")

    with FakeServer(Versioned()) as server:
        channel = Full()
        update = WeightUpdate([server.url], "2@run", channel, timeout_s=5)
        update.send(BUCKET)
        update.send(BUCKET)
        assert channel.abandoned == [server.url]
        assert "No space left" in update.failed[server.url]
