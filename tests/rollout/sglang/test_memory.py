"""Tests of memory release and resume with a server that ends, as SGLang does, on a resume without a release."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from megatron_vcr1.rollout.sglang import memory as memory_module
from megatron_vcr1.rollout.sglang.http import call, weight_version
from megatron_vcr1.rollout.sglang.memory import RELEASED, WEIGHTS_ONLY, MemoryRelease, has_weights_only
from tests.limits import HANG_S
from tests.rollout.sglang.fake_server import FakeServer, Reply


class ReleasingServer:
    """The memory states of a server; it ends where SGLang's scheduler would raise."""

    def __init__(self, release: Reply = (200, None)) -> None:
        self.version = "3@run"
        self.released: set[str] = set()  # SGLang's tags
        self.is_paused = self.has_ended = False
        self.release = release
        self.may_release, self.has_released = threading.Event(), threading.Event()
        self.may_release.set()

    def __call__(self, path: str, body: Any) -> Reply:
        if path == "/pause_generation":
            self.is_paused = True
        elif path == "/continue_generation":
            self.is_paused = False
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/release_memory_occupation":
            self.has_ended |= bool(self.released & {*body["tags"]}) or not self.is_paused
            self.may_release.wait(HANG_S)
            self.released |= {*body["tags"]} if self.release[0] == 200 else set()
            self.has_released.set()
            return self.release
        elif path == "/resume_memory_occupation":
            self.has_ended |= not {*body["tags"]} <= self.released or not self.is_paused
            self.released -= {*body["tags"]}
        return (500, {}) if self.has_ended else (200, {"weight_version": self.version, "tp_size": 1})

    @property
    def is_released(self) -> bool:
        return bool(self.released)


def memory_of(server: FakeServer) -> MemoryRelease:
    return MemoryRelease([server.url], None, timeout_s=HANG_S)


def test_resume_restores_the_weight_version() -> None:
    behavior = ReleasingServer()
    with FakeServer(behavior) as server:
        memory = memory_of(server)
        memory.resume()  # never released
        memory.release()
        memory.release()
        assert behavior.is_released and weight_version(server.url) == f"{RELEASED}3@run"
        memory.resume()
        memory.resume()
        assert (behavior.is_released, behavior.is_paused, behavior.has_ended) == (False, False, False)
        assert weight_version(server.url) == "3@run"


def test_weights_are_resumed_before_everything_else() -> None:
    behavior = ReleasingServer()
    with FakeServer(behavior) as server:
        memory = memory_of(server)
        memory.release()
        for finish in (memory.release, memory.resume):
            for _ in range(2):
                memory.resume_weights()
                assert behavior.released == {"kv_cache", "cuda_graph"} and behavior.is_paused
                assert weight_version(server.url) == f"{WEIGHTS_ONLY}3@run" and has_weights_only(server.url)
            finish()  # a sync may fail, and training needs the memory again
        memory.resume_weights()  # everything is resumed
        assert (behavior.released, behavior.is_paused, behavior.has_ended) == (set(), False, False)
        assert weight_version(server.url) == "3@run"


def test_servers_release_and_resume_at_the_same_time() -> None:
    both = threading.Barrier(2)

    class Slow(ReleasingServer):
        def __call__(self, path: str, body: Any) -> Reply:
            if path in ("/release_memory_occupation", "/resume_memory_occupation"):
                both.wait(HANG_S)
            return super().__call__(path, body)

    first, second = Slow(), Slow()
    with FakeServer(first) as server, FakeServer(second) as other:
        memory = MemoryRelease([server.url, other.url], None, timeout_s=HANG_S)
        memory.release()
        assert first.is_released and second.is_released
        memory.resume()
        assert not (first.is_released or second.is_released)


def test_memory_that_was_released_after_the_timeout_is_resumed(monkeypatch: pytest.MonkeyPatch) -> None:
    def call_with_timeout(url: str, method: str, path: str, body: Any, *, timeout_s: float) -> Any:
        return call(url, method, path, body, timeout_s=0.5 if path == "/release_memory_occupation" else timeout_s)

    monkeypatch.setattr(memory_module, "call", call_with_timeout)
    behavior = ReleasingServer()
    behavior.may_release.clear()
    with FakeServer(behavior) as server:
        memory = memory_of(server)
        memory.release()
        behavior.may_release.set()
        assert behavior.has_released.wait(HANG_S)
        memory.resume()
        assert (behavior.is_released, behavior.is_paused, behavior.version) == (False, False, "3@run")


def test_a_server_that_refuses_to_release_continues() -> None:
    behavior = ReleasingServer(release=(400, {"message": "not idle"}))
    with FakeServer(behavior) as server:
        memory = memory_of(server)
        memory.release()
        assert (behavior.is_paused, behavior.version) == (False, "3@run")
        memory.resume()
        assert not behavior.has_ended


def test_a_server_that_was_restarted_meanwhile_is_not_resumed() -> None:
    behavior = ReleasingServer()
    with FakeServer(behavior) as server:
        memory = memory_of(server)
        memory.release()
        behavior.version, behavior.released, behavior.is_paused = "default", set(), False
        memory.resume()
        assert not behavior.has_ended
