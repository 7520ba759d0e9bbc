"""The endpoint: threads read requests and decode their videos, and the main thread answers what waits together."""

from __future__ import annotations

import json
import logging
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from megatron_vcr1.data.encoding import EncodedPrompt, encode_messages
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams
from megatron_vcr1.serving.chat import RefusedRequest, completion, error_body, parse_request
from megatron_vcr1.serving.media import messages_with_files
from megatron_vcr1.types import RolloutGroup

MAX_BODY_BYTES = 1 << 30
_POLL_S = 0.2

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for.

    Attributes:
        prompts_per_batch: requests that are answered together.
        files: the folder below which file:// URLs may point.
        repetition_penalty: where it asks for none.
    """

    max_prompt_tokens: int
    max_new_tokens: int
    prompts_per_batch: int
    files: Path | None
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request on its way through the engine, and what tells whether its client has closed the connection."""

    prompt: EncodedPrompt
    params: SamplingParams
    num_responses: int
    seed: int
    is_given_up: Callable[[], bool]
    answer: Future[RolloutGroup] = field(default_factory=Future)


class ChatServer(ThreadingHTTPServer):
    """Serves one model under one name. `answer_forever` runs in the thread that owns the device."""

    daemon_threads = True
    request_queue_size = 1024  # clients that connect at the same time; beyond it, which is 5 by default, they are reset

    def __init__(
        self, address: tuple[str, int], name: str, engine: RolloutEngine, processor: PromptProcessor, limits: Limits
    ) -> None:
        super().__init__(address, _Handler)
        self.name = name
        self.processor = processor
        self.limits = limits
        self._engine = engine
        self._waiting: queue.Queue[_Waiting] = queue.Queue()
        self._stopped = threading.Event()

    def complete(self, body: bytes, is_given_up: Callable[[], bool]) -> dict[str, Any]:
        """What a request's answer holds; called by the threads of the connections.

        Args:
            is_given_up: whether the client has closed the connection; asked when the request's turn comes.

        Raises:
            RefusedRequest: the request, or a file of it, is at fault.
            ConnectionError: the client gave up before the request's turn.
        """
        request = parse_request(body)
        try:
            with messages_with_files(request, self.limits.files) as messages:
                prompt = encode_messages(messages, self.processor)
            params = request.sampling(self.limits.max_new_tokens, self.limits.repetition_penalty)
        except ValueError as error:  # a VideoError too
            raise RefusedRequest(str(error)) from error
        num_tokens = len(prompt.token_ids)
        if num_tokens > self.limits.max_prompt_tokens:
            raise RefusedRequest(
                f"the prompt has {num_tokens} tokens; up to {self.limits.max_prompt_tokens} are served"
            )
        waiting = _Waiting(prompt, params, request.n, request.seed, is_given_up)
        self._waiting.put(waiting)
        rollouts = waiting.answer.result().rollouts
        choices = [(self.processor.decode(one.token_ids), str(one.finish_reason)) for one in rollouts]
        return completion(self.name, choices, num_tokens, sum(len(one.token_ids) for one in rollouts))

    def answer_forever(self) -> None:
        """Answers in batches until `stop`."""
        while not self._stopped.is_set():
            for batch in self._batches():
                self._answer(batch)

    def stop(self) -> None:
        self._stopped.set()

    def _batches(self) -> Iterator[list[_Waiting]]:
        """What waits now, together where it is drawn alike; without those whose clients wait no more."""
        waiting = []
        try:
            waiting.append(self._waiting.get(timeout=_POLL_S))
            while len(waiting) < self.limits.prompts_per_batch:
                waiting.append(self._waiting.get_nowait())
        except queue.Empty:
            pass
        for one in waiting:
            if one.is_given_up():
                one.answer.set_exception(ConnectionError("the client has gone"))
        waiting = [one for one in waiting if not one.answer.done()]
        for params in dict.fromkeys(one.params for one in waiting):
            yield [one for one in waiting if one.params == params]

    def _answer(self, batch: list[_Waiting]) -> None:
        requests = [
            GenerationRequest(str(index), one.prompt, one.num_responses, one.seed) for index, one in enumerate(batch)
        ]
        try:
            groups = self._engine.generate(requests, batch[0].params)
        except Exception as error:  # every client must hear of it; the server goes on
            log.exception("%d requests failed", len(batch))
            for one in batch:
                one.answer.set_exception(error)
            return
        for one, group in zip(batch, groups, strict=True):
            one.answer.set_result(group)


@contextmanager
def listening(server: ChatServer) -> Iterator[None]:
    """Connections are taken, in a thread of their own, for the length of a with-block."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": _POLL_S}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.stop()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            model = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "vcr1"}
            self._send(HTTPStatus.OK, {"object": "list", "data": [model]})
        elif self.path == "/health":
            self._send(HTTPStatus.OK, {})
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"{self.path}: there are /v1/models, /v1/chat/completions and /health")

    def do_POST(self) -> None:
        if self.path != "/v1/chat/completions":
            self._refuse(HTTPStatus.NOT_FOUND, f"{self.path}: there is /v1/chat/completions")
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
            self.close_connection = True  # its body is not read
            self._refuse(
                HTTPStatus.BAD_REQUEST, f"the body's length must be stated, and at most {MAX_BODY_BYTES} bytes"
            )
            return
        body = self.rfile.read(int(length))
        try:
            self._send(HTTPStatus.OK, self.server.complete(body, self._is_given_up))
        except RefusedRequest as refused:
            self._refuse(HTTPStatus.BAD_REQUEST, str(refused))
        except ConnectionError:
            self.close_connection = True  # nobody waits any more
        except Exception as error:  # the engine's own, which `answer_forever` has logged
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")

    def _is_given_up(self) -> bool:
        """Whether the connection's other end is closed: it can be read, and holds nothing."""
        try:
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses, such as another method: in OpenAI's form too."""
        self.close_connection = True  # a body may be left in it
        status = HTTPStatus(code)
        self._refuse(status, message or status.phrase)

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self._send(status, error_body(message, kind))

    def _send(self, status: HTTPStatus, content: Any) -> None:
        payload = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug("%s %s", self.address_string(), format % args)
