"""HTTP connections that end if their client makes no progress.

uvicorn bounds the idle time between two requests. It waits forever for a client that sends a request byte by byte, or
that never reads its response, which would let a few clients use up all connections.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import h11
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_vcr1.serving.responses import error_body

HEADER_TIMEOUT_S = 20.0
"""From the first byte of a request (or the connection's start) to the end of its headers."""

STALL_TIMEOUT_S = 30.0
"""Longest pause within a request's body, or while the client does not read its response."""

BODY_TIMEOUT_S = 600.0
"""From the end of the headers to the end of the body."""

KEEP_ALIVE_S = 60
"""Idle time between two requests of a connection. Longer than clients keep connections in their pools, so that a
request seldom meets a connection that is just being closed."""

MAX_CONNECTIONS = 900
"""Further connections get 503. A process may usually open 1,024 files, and needs some for models and videos."""

_CHECK_INTERVAL_S = 1.0


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer requests of a connection that is one too many: an ASGI application."""
    body = error_body(f"the server has {MAX_CONNECTIONS} open connections; try again later", 503)
    await JSONResponse(body, 503, {"Retry-After": "1", "Connection": "close"})(scope, receive, send)


class BoundedConnection(H11Protocol):
    """uvicorn's HTTP/1.1 connection with time limits on the client's side.

    All methods run in the event loop's thread.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # uvicorn's own limit (limit_concurrency) answers in plain text.
        if len(self.connections) > MAX_CONNECTIONS:
            self.app = _refuse  # type: ignore[assignment]
        now = time.monotonic()
        self._head_since: float | None = now  # a new connection has to send a request soon
        self._body_since = self._last_data = now
        self._write_paused_since: float | None = None
        self._check = self.loop.call_later(_CHECK_INTERVAL_S, self._check_progress)

    def connection_lost(self, exc: Exception | None) -> None:
        self._check.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._last_data = time.monotonic()
        before = self.conn.their_state
        super().data_received(data)
        after = self.conn.their_state
        if after is h11.IDLE:
            # Part of a request's headers has arrived, or a whole request with the beginning of the next one.
            if self._head_since is None:
                self._head_since = self._last_data
        else:
            self._head_since = None
            if before is h11.IDLE:
                self._body_since = self._last_data

    def on_response_complete(self) -> None:
        self._head_since = None
        super().on_response_complete()

    def pause_writing(self) -> None:
        self._write_paused_since = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._write_paused_since = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, in the same format as every other error."""
        if self.conn.our_state is not h11.IDLE and self.conn.our_state is not h11.SEND_RESPONSE:
            self.transport.close()  # a response is already under way or complete
            return
        body = json.dumps(error_body(msg, 400)).encode()
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        events: list[Any] = [h11.Response(status_code=400, headers=headers, reason=b"Bad Request")]
        for event in (*events, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _check_progress(self) -> None:
        if self._is_stalled(time.monotonic()):
            self.transport.abort()
            return
        self._check = self.loop.call_later(_CHECK_INTERVAL_S, self._check_progress)

    def _is_stalled(self, now: float) -> bool:
        if self._write_paused_since is not None:
            return now - self._write_paused_since > STALL_TIMEOUT_S
        if self.conn.their_state is h11.IDLE:
            return self._head_since is not None and now - self._head_since > HEADER_TIMEOUT_S
        if self.conn.their_state is h11.SEND_BODY and not self.flow.read_paused:  # paused: the server is the slow side
            return now - self._last_data > STALL_TIMEOUT_S or now - self._body_since > BODY_TIMEOUT_S
        return False
