"""Tests of calls to servers: which errors they raise, and which servers are on this host."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import psutil
import pytest

from megatron_vcr1.rollout.sglang import http
from megatron_vcr1.rollout.sglang.http import (
    RequestRefused,
    ServerFault,
    async_client,
    call,
    call_async,
    is_on_this_host,
    is_ready,
    server_info,
    weight_version,
)
from tests.limits import HANG_S
from tests.rollout.sglang.fake_server import FakeServer


@pytest.mark.parametrize(
    "status, error", [(400, RequestRefused), (404, RequestRefused), (429, ServerFault), (500, ServerFault)]
)
@pytest.mark.parametrize(
    "body",
    [{"message": "no memory"}, {"error": {"message": "no memory"}}, {"detail": "no memory"}, "no memory"],
    ids=["message", "error", "detail", "text"],
)
def test_the_error_of_a_status_quotes_the_server(status: int, error: type[Exception], body: Any) -> None:
    with FakeServer(lambda path, _: (status, body)) as server:
        with pytest.raises(error, match=f"{server.url}/x: status {status}: .*no memory") as raised:
            call(server.url, "GET", "/x", timeout_s=HANG_S)
        assert not getattr(raised.value, "unreachable", False)
        assert not is_ready(server.url)


def test_a_server_that_does_not_respond_is_unreachable() -> None:
    is_over = threading.Event()

    def silent(path: str, body: Any) -> tuple[int, Any]:
        is_over.wait(HANG_S)
        return 200, {}

    async def call_with_timeout(url: str) -> None:
        async with async_client() as client:
            await call_async(client, "GET", f"{url}/x", timeout_s=0.1)

    with FakeServer(silent) as server:
        for attempt in (
            lambda: call(server.url, "GET", "/x", timeout_s=0.1),
            lambda: asyncio.run(call_with_timeout(server.url)),
        ):
            with pytest.raises(ServerFault) as raised:
                attempt()
            assert raised.value.unreachable
        is_over.set()
    with pytest.raises(ServerFault) as raised:
        call(server.url, "GET", "/x", timeout_s=HANG_S)  # closed
    assert raised.value.unreachable


def test_no_connection_is_used_twice() -> None:
    threads: list[threading.Thread] = []  # one for each connection

    def reply(path: str, body: Any) -> tuple[int, Any]:
        threads.append(threading.current_thread())
        return 200, {}

    async def call_twice(url: str) -> None:
        async with async_client() as client:
            for _ in range(2):
                await call_async(client, "GET", url, timeout_s=HANG_S)

    with FakeServer(reply) as server:
        asyncio.run(call_twice(server.url))
        for _ in range(2):
            call(server.url, "GET", "/", timeout_s=HANG_S)
    assert len(threads) == len({*threads}) == 4


def test_another_http_server_is_not_taken_for_sglang() -> None:
    with FakeServer(lambda path, body: (200, "hello")) as server, pytest.raises(ServerFault, match="an SGLang server"):
        weight_version(server.url)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"\xff\xfe", b"", b"[]", b"null", b'"tp_size"', b"{}"]
)
@pytest.mark.parametrize("status", [200, 400, 500])
def test_a_hostile_response_is_an_error_of_the_server(status: int, content: bytes) -> None:
    with FakeServer(lambda path, body: (status, content)) as server:
        for ask in (weight_version, server_info):
            with pytest.raises(RequestRefused if status == 400 else ServerFault):
                ask(server.url, timeout_s=HANG_S)
        if status != 200:
            with pytest.raises(RequestRefused if status == 400 else ServerFault):
                asyncio.run(ask_async(f"{server.url}/x"))


async def ask_async(url: str) -> Any:
    async with async_client() as client:
        return await call_async(client, "GET", url, timeout_s=HANG_S)


@pytest.mark.parametrize("size", ["2", None, 0, -1, 10**9, 1e999, True, [1]])
@pytest.mark.parametrize("key", ["tp_size", "dp_size", "pp_size"])
def test_sizes_that_no_server_has_are_refused(key: str, size: Any) -> None:
    with (
        FakeServer(lambda path, body: (200, {"tp_size": 1, key: size})) as server,
        pytest.raises(ServerFault, match=f"{key}.*an SGLang server"),
    ):
        server_info(server.url, timeout_s=HANG_S)


def test_a_huge_response_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_RESPONSE_BYTES", 10**6)
    with FakeServer(lambda path, body: (200, "x" * 10**7)) as server:
        for ask in (
            lambda: call(server.url, "GET", "/x", timeout_s=HANG_S),
            lambda: asyncio.run(ask_async(server.url)),
        ):
            with pytest.raises(ServerFault, match="more than 1000000 bytes"):
                ask()


def test_all_addresses_of_this_host_are_recognized() -> None:
    interfaces = [address for addresses in psutil.net_if_addrs().values() for address in addresses]
    own = [address.address for address in interfaces if address.family == socket.AF_INET]
    assert all(is_on_this_host(f"http://{host}:30000") for host in ("127.0.1.1", "localhost", *own))
    assert not any(is_on_this_host(f"http://{host}:30000") for host in ("192.0.2.1", "nowhere.invalid"))
