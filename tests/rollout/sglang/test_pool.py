"""Routing and retries against real HTTP servers that fail on demand."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from megatron_vcr1.rollout.engine import EngineError, WeightsNeeded
from megatron_vcr1.rollout.sglang import pool as pool_module
from megatron_vcr1.rollout.sglang.http import acall
from megatron_vcr1.rollout.sglang.pool import Server, ServerPool, UnusableAnswer
from tests.rollout.sglang.fake_server import FakeServer, Reply


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(pool_module, "PROBE_S", 0.01)


@pytest.fixture
def start() -> Iterator[Callable[[Callable[[str, Any], Reply]], FakeServer]]:
    with ExitStack() as stack:
        yield lambda reply: stack.enter_context(FakeServer(reply))


def healthy(path: str, body: Any) -> Reply:
    return (200, {"weight_version": "1"}) if path == "/model_info" else (200, {"echo": body})


def ask_all(
    servers: Sequence[FakeServer],
    bodies: Sequence[Any],
    *,
    absent: Sequence[str] = (),
    timeout_s: float = 5,
    **options: Any,
) -> list[Any]:
    async def run() -> list[Any]:
        settings = {"concurrency": 4, "return_timeout_s": 2.0} | options
        pool = ServerPool([one.url for one in servers if one.url not in absent], absent, "1", **settings)
        async with httpx.AsyncClient() as client:

            async def ask(server: Server, body: Any) -> Any:
                answer = await acall(client, "POST", f"{server.url}/generate", body, timeout_s=timeout_s)
                if answer.get("unusable"):
                    raise UnusableAnswer("cut off")
                return answer["echo"]

            try:
                return await asyncio.gather(
                    *(pool.ask(str(body), 1, lambda server, body=body: ask(server, body)) for body in bodies)
                )
            finally:
                await pool.close()

    return asyncio.run(run())


@pytest.mark.parametrize("concurrency, num_requests", [(2, 8), (8, 4)], ids=["a free place", "least loaded"])
def test_requests_go_to_the_least_loaded_server_with_a_free_place(
    start: Any, concurrency: int, num_requests: int
) -> None:
    here, lock, most = {}, threading.Lock(), {}
    barrier = threading.Barrier(4)

    def slow(name: str) -> Callable[[str, Any], Reply]:
        def reply(path: str, body: Any) -> Reply:
            with lock:
                here[name] = here.get(name, 0) + 1
                most[name] = max(most.get(name, 0), here[name])
            barrier.wait(10)  # four at once: two on each
            with lock:
                here[name] -= 1
            return 200, {"echo": body}

        return reply

    servers = [start(slow("a")), start(slow("b"))]
    assert ask_all(servers, list(range(num_requests)), concurrency=concurrency) == list(range(num_requests))
    assert most == {"a": 2, "b": 2}
    assert [one.count("/generate") for one in servers] == [num_requests // 2] * 2


def test_status_500_is_asked_again_elsewhere_and_never_twice(start: Any) -> None:
    """And a server whose last answer was one gets one request at a time."""
    here, most, has_failed = 0, 0, False
    lock = threading.Lock()

    def fail(path: str, body: Any) -> Reply:
        nonlocal here, most, has_failed
        if is_later := has_failed:
            with lock:
                here += 1
                most = max(most, here)
        time.sleep(0.02)
        with lock:
            here -= is_later
            has_failed = True
        return 500, {"error": "out of memory"}

    def answer(path: str, body: Any) -> Reply:
        time.sleep(0.02)
        return healthy(path, body)

    broken, good = start(fail), start(answer)
    assert ask_all([broken, good], list(range(20)), concurrency=2) == list(range(20))
    assert most == 1
    bodies = [body for _, body in broken.requests]
    assert len(bodies) == len(set(bodies)) > 2
    assert good.count("/generate") == 20


def test_an_unusable_answer_is_asked_for_again(start: Any) -> None:
    answers = iter([(200, {"unusable": True}), (200, {"echo": "x"})])
    assert ask_all([start(lambda path, body: next(answers))], ["x"]) == ["x"]


def test_after_all_tries_the_error_tells_them(start: Any) -> None:
    with pytest.raises(EngineError, match=r"sample x: 5 tries failed: .*status 500: out of memory"):
        ask_all([start(lambda path, body: (500, {"error": {"message": "out of memory"}}))], ["x"])


def test_a_refused_request_is_not_asked_again(start: Any) -> None:
    server = start(lambda path, body: (400, {"error": {"message": "prompt too long"}}))
    with pytest.raises(EngineError, match=r"sample x: .*prompt too long"):
        ask_all([server], ["x"])
    assert server.count("/generate") == 1


def test_a_dead_server_leaves_its_requests_to_the_others(start: Any) -> None:
    dead = start(healthy)
    dead.close()
    assert ask_all([dead, start(healthy)], list(range(6))) == list(range(6))


def test_a_silent_server_is_given_up_after_the_time_out_and_comes_back(start: Any) -> None:
    silent, release = [True], threading.Event()

    def reply(path: str, body: Any) -> Reply:
        if path == "/generate" and silent[0]:
            silent[0] = False
            release.wait(10)
        return healthy(path, body)

    assert ask_all([start(reply)], ["x"], timeout_s=0.3) == ["x"]
    release.set()


def test_no_server_left_is_an_error_and_not_a_wait(start: Any) -> None:
    dead = start(healthy)
    dead.close()
    with pytest.raises(EngineError, match=r"no SGLang server is left: .* was not back within 0 s"):
        ask_all([dead], ["x"], return_timeout_s=0.2)


def test_a_server_that_came_back_with_other_weights_is_not_asked(start: Any) -> None:
    old = start(
        lambda path, body: (200, {"weight_version": "default"}) if path == "/model_info" else (200, {"echo": 0})
    )
    with pytest.raises(WeightsNeeded, match="has weights 'default' instead of '1'"):
        ask_all([old], ["x"], absent=[old.url])
    assert old.count("/generate") == 0
    good = start(healthy)
    assert ask_all([old, good], ["x", "y"], absent=[old.url]) == ["x", "y"]
    assert old.count("/generate") == 0


@pytest.mark.parametrize("answer", ["hello", {"status": "fine"}, [1]])
def test_what_is_no_sglang_server_is_named(start: Any, answer: Any) -> None:
    other = start(lambda path, body: (200, answer))
    expected = rf"no SGLang server is left: {other.url} was left out, .*{other.url}/model_info: .*'weight_version'"
    with pytest.raises(EngineError, match=expected):
        ask_all([other], ["x"], absent=[other.url], return_timeout_s=0.2)


class Keeper:
    def __init__(self) -> None:
        self.restarts: list[tuple[str, str]] = []
        self.lost: str | None = None

    def failure(self, url: str) -> str | None:
        return self.lost

    def restart(self, url: str, reason: str) -> None:
        self.restarts.append((url, reason))


def test_a_server_that_does_not_recover_is_started_anew(start: Any) -> None:
    keeper = Keeper()

    def reply(path: str, body: Any) -> Reply:
        return healthy(path, body) if keeper.restarts else (503, {})

    server = start(reply)
    assert ask_all([server], ["x"], absent=[server.url], keeper=keeper) == ["x"]
    assert keeper.restarts == [(server.url, f"does not recover: {server.url} was left out")]


def test_a_server_whose_process_is_given_up_is_not_waited_for(start: Any) -> None:
    keeper = Keeper()
    keeper.lost = "has no restart left"
    dead = start(healthy)
    dead.close()
    with pytest.raises(EngineError, match="no SGLang server is left: has no restart left"):
        ask_all([dead], ["x"], keeper=keeper, return_timeout_s=60)


def test_stopped_means_no_further_tries(start: Any) -> None:
    with pytest.raises(EngineError, match="sampling was stopped"):
        ask_all([start(healthy)], ["x"], is_stopped=lambda: True)
