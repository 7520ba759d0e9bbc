"""The server: uvicorn's event loop in a thread of its own, and the engine in the thread that calls `run`."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.rollout.local.engine import LocalEngine
from megatron_vcr1.serving.app import ChatApp, Limits
from megatron_vcr1.serving.batching import Batcher
from megatron_vcr1.serving.connections import KEEP_ALIVE_S, BoundedConnection
from megatron_vcr1.serving.hosts import allowed_hosts

_BACKLOG = 1024  # clients that connect at the same instant; the kernel resets further ones
_SHUTDOWN_S = 5  # for responses that are being sent


class ChatServer:
    """One model at one address.

    Threads: `listening` starts the thread of the event loop, which decodes requests in a few worker threads. The engine
    runs in the thread that calls `run`. Nothing but `Batcher` is shared between them.
    """

    def __init__(
        self,
        address: tuple[str, int],
        name: str,
        engine: LocalEngine,
        processor: PromptProcessor,
        limits: Limits,
        extra_hosts: Sequence[str] = (),
    ) -> None:
        """Bind the address; connections are accepted in `listening`.

        Args:
            address: host and port; port 0 takes any free port.
            name: the model's name for clients.
            engine: generates the responses.
            processor: encodes the prompts.
            limits: limits on requests.
            extra_hosts: further host names that clients may use, see `allowed_hosts`.

        Raises:
            OSError, OverflowError: the address cannot be used.
        """
        self.name = name
        self._batcher = Batcher(engine, limits.prompts_per_batch)
        self._socket = _bind(*address)
        self._app = ChatApp(name, processor, self._batcher, limits)
        config = uvicorn.Config(
            self._app.build(allowed_hosts(address[0], extra_hosts)),
            loop="asyncio",
            http=BoundedConnection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",  # warnings are about clients: invalid requests, too many connections
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=_SHUTDOWN_S,
        )
        self._http = uvicorn.Server(config)

    @property
    def port(self) -> int:
        """The port that the server listens on."""
        return self._socket.getsockname()[1]

    def run(self) -> None:
        """Generate responses in this thread until `stop` is called."""
        self._batcher.run()

    def stop(self) -> None:
        """Let `run` return after the batch that is running. Safe in a signal handler."""
        self._batcher.stop()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Accept connections for the length of a with-block.

        Leaving it stops `run`, sends the responses that are ready, refuses the requests that still wait, and closes all
        connections.
        """
        thread = threading.Thread(target=self._http.run, kwargs={"sockets": [self._socket]}, name="http", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.stop()
            self._batcher.refuse_waiting()  # `run` may never have been called
            self._http.should_exit = True
            thread.join()
            self._socket.close()
            self._app.close()


def _bind(host: str, port: int) -> socket.socket:
    """Bind and listen at once, so that early clients wait instead of being refused."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
