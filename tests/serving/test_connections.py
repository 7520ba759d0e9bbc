"""Connections of clients that are slow, leave early or send no valid HTTP, on the real process."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.limits import HANG_S
from tests.serving.requests import STALL_TIMEOUT_S, ServerProcess, ask, post, text

pytestmark = pytest.mark.xdist_group("serving")  # one worker, one server

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
BODY = json.dumps({"messages": [{"role": "user", "content": "when?"}], "max_tokens": 2}).encode()


def is_closed(connection: socket.socket) -> bool:
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


def read_response(connection: socket.socket) -> tuple[int, bytes]:
    """Read exactly one response."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(1)
    head, _, body = data.partition(b"\r\n\r\n")
    (length,) = [int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    while len(body) < length:
        body += connection.recv(length - len(body))
    return int(head.split()[1]), body


@pytest.fixture
def strict_server(folder: Path) -> Iterator[ServerProcess]:
    """A server with short time limits, which on a busy machine a good client may exceed, too."""
    with ServerProcess(folder / "model", stall_timeout_s=STALL_TIMEOUT_S) as server:
        yield server


def test_slow_clients_are_disconnected(strict_server: ServerProcess) -> None:
    server = strict_server
    starts = {
        "nothing": b"",
        "part of the headers": HEAD,
        "part of the body": HEAD + b"Content-Length: 100\r\n\r\n{",
        "a refused request without its body": HEAD.replace(b"chat", b"nowhere") + b"Content-Length: 100\r\n\r\n",
    }
    connections = {name: server.connect() for name in starts}
    for name, connection in connections.items():
        connection.sendall(starts[name])
    dripping = server.connect()
    start = time.monotonic()
    dripping.settimeout(0.2)
    while time.monotonic() - start < HANG_S:  # one byte of a header at a time
        try:
            dripping.sendall(b"a")
            if dripping.recv(1) == b"":
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    else:
        raise AssertionError("a client that sends its headers byte by byte keeps its connection")
    assert read_response(connections["a refused request without its body"])[0] == 404
    for name, connection in connections.items():
        assert is_closed(connection), name
    assert post(server.url, BODY)[0] == 200


def test_keep_alive_stays_in_sync_after_refused_requests(server: ServerProcess) -> None:
    length = b"Content-Length: %d\r\n\r\n" % len(BODY)
    with server.connect() as connection:
        for head, status in (
            (HEAD, 200),
            (HEAD.replace(b"chat", b"nowhere"), 404),
            (HEAD.replace(b"POST", b"PUT"), 405),
            (HEAD.replace(b"localhost", b"evil.example"), 421),
            (HEAD + b"Origin: http://evil.example\r\n", 403),
            (HEAD + b"Origin: http://localhost\r\nOrigin: http://evil.example\r\n", 403),
            (HEAD, 200),
        ):
            connection.sendall(head + length + BODY)
            assert read_response(connection)[0] == status


def test_bytes_that_are_not_http_get_400(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        status, body = read_response(connection)
        assert status == 400
        assert json.loads(body)["error"]["type"] == "invalid_request_error"
        assert is_closed(connection)


def test_a_body_with_two_lengths_is_refused(server: ServerProcess) -> None:
    """A proxy that believes the other length would take the rest for another request."""
    with server.connect() as connection:
        connection.sendall(HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + HEAD)
        status, body = read_response(connection)
        assert (status, "exclude each other" in json.loads(body)["error"]["message"]) == (400, True)
        assert is_closed(connection)


def test_very_long_headers_are_refused(server: ServerProcess) -> None:
    with server.connect() as connection:
        connection.sendall(HEAD + b"X: " + b"x" * 200_000)
        assert read_response(connection)[0] in (400, 431)


def test_clients_that_leave_cause_no_traceback(server: ServerProcess, client: openai.OpenAI) -> None:
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    for sent in (b"", HEAD, request[:-5], request, request + request):
        with server.connect() as connection:
            connection.sendall(sent)
        with server.connect() as connection:  # with a reset instead of an orderly end
            connection.sendall(sent)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    assert ask(client, text("when?")).choices
    assert "Traceback" not in server.errors()
    assert "Exception" not in server.errors()
