"""Tests of routing and retries with real HTTP servers that fail on demand."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest

from megatron_vcr1.rollout.engine import EngineError, WeightsNeeded
from megatron_vcr1.rollout.sglang import pool as pool_module
from megatron_vcr1.rollout.sglang.http import async_client, call_async
from megatron_vcr1.rollout.sglang.pool import Server, ServerPool, UnusableResponse
from tests.limits import HANG_S
from tests.rollout.sglang.fake_server import FakeServer, Reply


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(pool_module, "PROBE_INTERVAL_S", 0.01)


@pytest.fixture
def start() -> Iterator[Callable[[Callable[[str, Any], Reply]], FakeServer]]:
    with ExitStack() as stack:
        yield lambda reply: stack.enter_context(FakeServer(reply))


def healthy(path: str, body: Any) -> Reply:
    return (200, {"weight_version": "1"}) if path == "/model_info" else (200, {"echo": body})


def run_all(
    servers: Sequence[FakeServer],
    bodies: Sequence[Any],
    *,
    unavailable: Sequence[str] = (),
    first_timeout_s: float = HANG_S,
    **options: Any,
) -> list[Any]:
    timeouts = iter([first_timeout_s])

    async def run() -> list[Any]:
        settings = {"concurrency": 4, "return_timeout_s": HANG_S} | options
        pool = ServerPool(
            [server.url for server in servers if server.url not in unavailable], unavailable, "1", **settings
        )
        async with async_client() as client:

            async def send(server: Server, body: Any) -> Any:
                limit_s = next(timeouts, HANG_S)
                answer = await call_async(client, "POST", f"{server.url}/generate", body, timeout_s=limit_s)
                if answer.get("unusable"):
                    raise UnusableResponse("cut off")
                return answer["echo"]

            try:
                return await asyncio.gather(
                    *(pool.run(str(body), 1, lambda server, body=body: send(server, body)) for body in bodies)
                )
            finally:
                await pool.close()

    return asyncio.run(run())


@pytest.mark.parametrize("concurrency, num_requests", [(2, 8), (8, 4)], ids=["a free slot", "least loaded"])
def test_requests_go_to_the_least_loaded_server_with_a_free_slot(
    start: Any, concurrency: int, num_requests: int
) -> None:
    running, lock, most = {}, threading.Lock(), {}
    barrier = threading.Barrier(4)

    def slow(name: str) -> Callable[[str, Any], Reply]:
        def reply(path: str, body: Any) -> Reply:
            with lock:
                running[name] = running.get(name, 0) + 1
                most[name] = max(most.get(name, 0), running[name])
            barrier.wait(HANG_S)  # four at once: two on each server
            with lock:
                running[name] -= 1
            return 200, {"echo": body}

        return reply

    servers = [start(slow("a")), start(slow("b"))]
    assert run_all(servers, list(range(num_requests)), concurrency=concurrency) == list(range(num_requests))
    assert most == {"a": 2, "b": 2}
    assert [server.count("/generate") for server in servers] == [num_requests // 2] * 2


def test_status_500_is_retried_on_another_server(start: Any) -> None:
    """No server gets a request twice, and a server whose last response was an error gets one request at a time."""
    running, most, has_failed = 0, 0, False
    lock = threading.Lock()

    def fail(path: str, body: Any) -> Reply:
        nonlocal running, most, has_failed
        if is_later := has_failed:
            with lock:
                running += 1
                most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= is_later
            has_failed = True
        return 500, {"error": "out of memory"}

    def answer(path: str, body: Any) -> Reply:
        time.sleep(0.02)
        return healthy(path, body)

    broken, good = start(fail), start(answer)
    assert run_all([broken, good], list(range(20)), concurrency=2) == list(range(20))
    assert most == 1
    bodies = [body for _, body in broken.requests]
    assert len(bodies) == len(set(bodies)) > 2
    assert good.count("/generate") == 20


def test_an_unusable_response_is_retried(start: Any) -> None:
    answers = iter([(200, {"unusable": True}), (200, {"echo": "x"})])
    assert run_all([start(lambda path, body: next(answers))], ["x"]) == ["x"]


def test_the_error_after_all_attempts_lists_them(start: Any) -> None:
    with pytest.raises(EngineError, match=r"sample x: 5 attempts failed: .*status 500: out of memory"):
        run_all([start(lambda path, body: (500, {"error": {"message": "out of memory"}}))], ["x"])


def test_a_refused_request_is_not_retried(start: Any) -> None:
    server = start(lambda path, body: (400, {"error": {"message": "prompt too long"}}))
    with pytest.raises(EngineError, match=r"sample x: .*prompt too long"):
        run_all([server], ["x"])
    assert server.count("/generate") == 1


def test_the_others_take_over_the_requests_of_a_dead_server(start: Any) -> None:
    dead = start(healthy)
    dead.close()
    assert run_all([dead, start(healthy)], list(range(6))) == list(range(6))


def test_a_silent_server_is_dropped_after_the_timeout_and_returns(start: Any) -> None:
    is_silent, release = iter([True]), threading.Event()

    def reply(path: str, body: Any) -> Reply:
        if path == "/generate" and next(is_silent, False):
            release.wait(HANG_S)
        return healthy(path, body)

    assert run_all([start(reply)], ["x"], first_timeout_s=1) == ["x"]
    release.set()


def test_no_server_left_is_an_error(start: Any) -> None:
    dead = start(healthy)
    dead.close()
    with pytest.raises(EngineError, match=r"no SGLang server is left: .* was not back within 0 s"):
        run_all([dead], ["x"], return_timeout_s=0.2)


def test_a_server_that_returned_with_other_weights_gets_no_requests(start: Any) -> None:
    old = start(
        lambda path, body: (200, {"weight_version": "default"}) if path == "/model_info" else (200, {"echo": 0})
    )
    with pytest.raises(WeightsNeeded, match="has weights 'default' instead of '1'"):
        run_all([old], ["x"], unavailable=[old.url])
    assert old.count("/generate") == 0
    good = start(healthy)
    assert run_all([old, good], ["x", "y"], unavailable=[old.url]) == ["x", "y"]
    assert old.count("/generate") == 0


@pytest.mark.parametrize("answer", ["hello", {"status": "fine"}, [1]])
def test_a_server_that_is_not_sglang_is_named(start: Any, answer: Any) -> None:
    other = start(lambda path, body: (200, answer))
    expected = rf"no SGLang server is left: {other.url} did not have .*{other.url}/model_info: .*'weight_version'"
    with pytest.raises(EngineError, match=expected):
        run_all([other], ["x"], unavailable=[other.url], return_timeout_s=0.2)


class Supervisor:
    def __init__(self) -> None:
        self.restarts: list[tuple[str, str]] = []
        self.lost: str | None = None

    def failure(self, url: str) -> str | None:
        return self.lost

    def restart(self, url: str, reason: str) -> None:
        self.restarts.append((url, reason))


def test_a_server_that_does_not_recover_is_restarted(start: Any) -> None:
    supervisor = Supervisor()

    def reply(path: str, body: Any) -> Reply:
        return healthy(path, body) if supervisor.restarts else (503, {})

    server = start(reply)
    assert run_all([server], ["x"], unavailable=[server.url], supervisor=supervisor) == ["x"]
    assert supervisor.restarts == [(server.url, f"does not recover: {server.url} did not have the policy's weights")]


def test_a_server_that_will_not_be_restarted_is_not_waited_for(start: Any) -> None:
    supervisor = Supervisor()
    supervisor.lost = "has no restart left"
    dead = start(healthy)
    dead.close()
    with pytest.raises(EngineError, match="no SGLang server is left: has no restart left"):
        run_all([dead], ["x"], supervisor=supervisor, return_timeout_s=HANG_S)


def test_a_server_that_fails_again_right_after_its_return_is_waited_for(start: Any) -> None:
    server = start(healthy)

    async def run() -> str:
        pool = ServerPool([], [server.url], "1", concurrency=1, return_timeout_s=HANG_S)
        try:
            async with pool._changed:  # the task that waits for the server cannot announce its return
                while server.url not in pool._usable:
                    await asyncio.sleep(0.001)
                pool._drop(pool._usable[server.url], "another request failed")
            return await pool.run("x", 1, lambda server: asyncio.sleep(0, server.url))
        finally:
            await pool.close()

    assert asyncio.run(run()) == server.url


def test_an_abort_ends_the_attempts(start: Any) -> None:
    with pytest.raises(EngineError, match="sampling was aborted"):
        run_all([start(healthy)], ["x"], is_aborted=lambda: True)
