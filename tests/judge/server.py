"""A judge server over real HTTP that matches words, and fails in the ways that a test selects."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from megatron_vcr1.config.evaluation_sections import JudgeSection
from megatron_vcr1.judge.lexical import LexicalBackend
from tests.limits import HANG_S


class JudgeServer(ThreadingHTTPServer):
    """A chat completion server.

    Attributes:
        faults: names of the faults of the next requests (see `_faulty_text` and `_Handler._reply`); the requests after
            them succeed.
        always: fault of every request; None means that requests succeed.
        bodies: body of every request so far.
        keys: Authorization headers of the requests.
        max_concurrent: largest number of requests that were handled at the same time.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults: list[str] = []
        self.always: str | None = None
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.max_concurrent = 0
        self._num_active = 0
        self.lock = threading.Lock()
        self.is_over = threading.Event()
        self.three = threading.Barrier(3)

    def section(self, **settings: Any) -> JudgeSection:
        url = f"http://127.0.0.1:{self.server_port}/v1"
        defaults = {"kind": "openai", "base_url": url, "model": "judge-model", "timeout_s": HANG_S, "max_retries": 2}
        return JudgeSection.model_validate(defaults | {"concurrency": 4} | settings)

    @property
    def materials(self) -> list[dict[str, Any]]:
        """The decoded user message of each request."""
        return [json.loads(body["messages"][1]["content"]) for body in self.bodies]

    def enter(self, body: dict[str, Any], key: str) -> str | None:
        with self.lock:
            self.bodies.append(body)
            self.keys.add(key)
            self._num_active += 1
            self.max_concurrent = max(self.max_concurrent, self._num_active)
            return self.always or (self.faults.pop(0) if self.faults else None)

    def leave(self) -> None:
        with self.lock:
            self._num_active -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that close the connection: tests do so on purpose."""


@contextmanager
def judge_server() -> Iterator[JudgeServer]:
    with JudgeServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.is_over.set()
            server.shutdown()
            thread.join()


def correct_response(body: dict[str, Any]) -> dict[str, Any]:
    material = json.loads(body["messages"][1]["content"])
    backend = LexicalBackend()
    if set(material) == {"description"}:
        return {"events": list(backend.extract_events([material["description"]])[0] or ())}
    events = tuple(entry["sentence"] for entry in material["events"])
    verdicts = backend.judge_events([(events, material["description"])])[0] or ()
    return {"verdicts": [{"event": number, "verdict": str(verdict)} for number, verdict in enumerate(verdicts, 1)]}


def _faulty_text(answer: dict[str, Any], fault: str) -> str:
    """Return the text of a completion that has a fault."""
    key, entries = next(iter(answer.items()))
    match fault:
        case "chatty":
            return f"<think>{{a brace}}</think>Of course!\n```json\n{json.dumps(answer, indent=1)}\n```\nDone."
        case "endless_thought":
            return f"<think>Perhaps {json.dumps(answer)}"
        case "no_json":
            return "All events are entailed, trust me."
        case "truncated":
            return json.dumps(answer)[:-4]
        case "one_missing":
            return json.dumps({key: entries[1:]})
        case "one_extra":
            return json.dumps({key: [*entries, {"event": len(entries) + 1, "verdict": "entailment"}]})
        case "duplicate":
            return json.dumps({key: [entries[0], *entries[:-1]] if len(entries) > 1 else entries * 2})
        case "bad_verdict":
            return json.dumps({key: [entry | {"verdict": "very true"} for entry in entries]})
        case "not_a_list":
            return json.dumps({key: "entailment"})
    return json.dumps(answer)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: JudgeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.server.enter(body, self.headers["Authorization"])
        try:
            self._reply(body, fault)
        finally:
            self.server.leave()

    def _reply(self, body: dict[str, Any], fault: str | None) -> None:
        if fault == "hangs_up":
            self.close_connection = True
            return
        if fault == "stuck":
            self.server.is_over.wait(HANG_S)
        if fault == "waits_for_two_more":
            self.server.three.wait(HANG_S)
        if fault is not None and fault.isdigit():
            return self._send(int(fault), json.dumps({"error": {"message": f"status {fault}"}}), "application/json")
        if fault == "html":
            return self._send(200, "<html>please log in</html>", "text/html")
        if fault == "broken_json":
            return self._send(200, '{"choices": [', "application/json")
        if fault == "no_choices":
            return self._send(200, json.dumps({"choices": []}), "application/json")
        if fault == "no_schema" and "response_format" in body:
            return self._send(400, json.dumps({"error": {"message": "what is json_schema?"}}), "application/json")
        if fault == "fixed_temperature" and "temperature" in body:
            message = "Unsupported value: 'temperature' does not support 0.0 with this model"
            return self._send(400, json.dumps({"error": {"message": message}}), "application/json")
        text = _faulty_text(correct_response(body), fault or "")
        message = {"role": "assistant", "content": None if fault == "no_text" else text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        completion = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge-model", "choices": [choice]}
        return self._send(200, json.dumps(completion), "application/json")

    def _send(self, status: int, text: str, kind: str) -> None:
        payload = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(payload)))
        if status == 429:
            self.send_header("Retry-After", "0.01")
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the log out of the tests' output."""


def count(items: list[Any]) -> Counter[str]:
    return Counter(json.dumps(item, sort_keys=True) for item in items)
