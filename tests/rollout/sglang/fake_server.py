"""A small HTTP server with scripted responses, for faults that a real SGLang server does not show on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

import httpx

from tests.limits import HANG_S

Reply = tuple[int, Any]  # status, and a value to send as JSON, or bytes to send as they are


class FakeServer:
    """An HTTP server that calls `reply(path, body)` in a thread for each request, and records the requests."""

    def __init__(self, reply: Callable[[str, Any], Reply]) -> None:
        self.requests: list[tuple[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self._answer(json.loads(content) if content else None)

            def _answer(self, body: Any) -> None:
                outer.requests.append((self.path, body))
                status, answer = reply(self.path, body)
                content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args: Any) -> None:
                """Ignore clients that hang up early: some tests do it on purpose."""

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def count(self, path: str) -> int:
        return sum(requested == path for requested, _ in self.requests)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def proxy(upstream: str, intervene: Callable[[str, Any], Reply | None]) -> FakeServer:
    """Put a server in front of a real one; `intervene` may respond in its place, or do something first."""

    def reply(path: str, body: Any) -> Reply:
        answer = intervene(path, body)
        if answer is not None:
            return answer
        method = "GET" if body is None and path in ("/model_info", "/server_info", "/health_generate") else "POST"
        try:
            real = httpx.request(method, upstream + path, json=body, timeout=HANG_S, trust_env=False)
        except httpx.HTTPError as error:
            return 502, {"error": f"{type(error).__name__} {error}"}
        try:
            return real.status_code, real.json()
        except ValueError:
            return real.status_code, real.text

    return FakeServer(reply)
