"""Routing of requests: least-loaded servers, retries, and servers that drop out and return."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from megatron_vcr1.rollout.engine import EngineError, WeightsNeeded
from megatron_vcr1.rollout.sglang.http import (
    HEALTH_TIMEOUT_S,
    RequestRefused,
    ServerFault,
    async_client,
    call_async,
    parse_weight_version,
)

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_ATTEMPTS = 5
"""Attempts for one request, after which the engine fails."""
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.5, 8.0
PROBE_INTERVAL_S = 1.0
"""Time between two health checks of a server that has dropped out."""
MAX_FAILED_PROBES = 5
"""Failed health checks after which the server's process is restarted (a process that is starting is left alone)."""


class UnusableResponse(Exception):
    """A server responded, but the content cannot be used. A retry may help."""


class WrongWeights(UnusableResponse):
    """A response was sampled from other weights than the policy's."""


@dataclass(slots=True)
class Server:
    """A server, as its client sees it."""

    url: str
    load: int = 0
    """Number of responses that it is sampling."""
    faults: int = 0
    """Number of consecutive faults."""


class Supervisor(Protocol):
    """The part of `ServerGroup` that the pool uses, for servers that this process has started."""

    def failure(self, url: str) -> str | None: ...

    def restart(self, url: str, reason: str) -> None: ...


class ServerPool:
    """The servers of one call of `generate`.

    A server is in one of four states:

        usable        has the policy's weights and gets requests
        returning     has dropped out; a task checks its health until it is back or the timeout expires
        outdated      is back, but with other weights: a weight sync would help
        lost          is not back in time, or its supervisor will not restart it

    All methods run in one event loop. State changes are announced by the condition `_changed`, on which requests wait
    while no server is free.
    """

    def __init__(
        self,
        current: Sequence[str],
        unavailable: Sequence[str],
        weight_version: str,
        *,
        concurrency: int,
        return_timeout_s: float,
        supervisor: Supervisor | None = None,
        is_aborted: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            current: URLs of the servers that have the policy's weights.
            unavailable: URLs of servers that are restarting or missed a weight sync; they get requests once they are
                back with the policy's weights.
            weight_version: the version that a server must report.
            concurrency: maximum number of concurrent requests per server.
            return_timeout_s: maximum time to wait for a server that has dropped out.
            supervisor: supervises the servers' processes, if this process has started them.
            is_aborted: returns whether sampling was aborted; checked before every attempt.
        """
        self._weight_version = weight_version
        self._concurrency = concurrency
        self._return_timeout_s = return_timeout_s
        self._supervisor = supervisor
        self._is_aborted = is_aborted
        self._usable = {url: Server(url) for url in current}
        self._returning: dict[str, asyncio.Task[None]] = {}
        self._num_requests: dict[str, int] = {}
        self._lost: dict[str, str] = {}
        self._outdated: dict[str, str] = {}
        self._changed = asyncio.Condition()
        for url in unavailable:
            self._wait_for_return(Server(url), f"{url} did not have the policy's weights")

    async def run(self, name: str, num_responses: int, send: Callable[[Server], Awaitable[Result]]) -> Result:
        """Send a request to one of the servers; if it fails, to another one, or to the same one again.

        Args:
            name: name of the request, for messages.
            num_responses: number of responses, which is the request's load in routing.
            send: sends the request to a server and returns its result.

        Raises:
            EngineError: a server refuses the request, all attempts failed, no server is left, or sampling was aborted.
            WeightsNeeded: no server is usable or returning, but one is back with other weights.
        """
        failures: list[str] = []
        tried: set[str] = set()
        for attempt in range(MAX_ATTEMPTS):
            if failures:
                # Exponential backoff with full jitter: requests that failed together must not return together.
                await asyncio.sleep(random.uniform(0, min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2**attempt)))
            if self._is_aborted():
                raise EngineError("sampling was aborted")
            # The slot is held for one attempt only: during the backoff, other requests can use the server.
            async with self._acquire(num_responses, tried) as server:
                tried.add(server.url)
                try:
                    result = await send(server)
                except RequestRefused as error:
                    raise EngineError(f"sample {name}: {error}") from error
                except (ServerFault, UnusableResponse) as error:
                    failures.append(f"{server.url}: {error}")
                    logger.warning("sample %s, attempt %d of %d: %s", name, attempt + 1, MAX_ATTEMPTS, failures[-1])
                    server.faults += 1
                    # An error status leaves a server usable. Silence and wrong weights do not.
                    if isinstance(error, WrongWeights) or (isinstance(error, ServerFault) and error.unreachable):
                        self._drop(server, str(error))
                else:
                    server.faults = 0
                    return result
        raise EngineError(f"sample {name}: {MAX_ATTEMPTS} attempts failed: " + "; ".join(failures))

    async def close(self) -> None:
        """Cancel the tasks that wait for servers."""
        for task in self._returning.values():
            task.cancel()
        await asyncio.gather(*self._returning.values(), return_exceptions=True)

    @asynccontextmanager
    async def _acquire(self, num_responses: int, tried: Set[str]) -> AsyncIterator[Server]:
        """Wait for a server with a free slot and occupy the slot for the length of the with-block."""
        async with self._changed:
            while (server := self._choose(tried)) is None:
                await self._changed.wait()
            # No `await` between the choice and these two lines, so no other request can take the slot in between.
            server.load += num_responses
            self._num_requests[server.url] = self._num_requests.get(server.url, 0) + 1
        try:
            yield server
        finally:
            server.load -= num_responses
            self._num_requests[server.url] -= 1
            async with self._changed:
                self._changed.notify_all()

    def _choose(self, tried: Set[str]) -> Server | None:
        """Return the least-loaded usable server with a free slot, or None if the request has to wait for one.

        A server that fails immediately always has the smallest load and would attract all requests. So a server whose
        last response was a fault gets one request at a time, and only if no other server is free. A request goes to a
        server that it has tried before only if no other server is usable.

        Raises:
            WeightsNeeded, EngineError: no server will become free.
        """
        usable = list(self._usable.values())
        candidates = [server for server in usable if server.url not in tried] or usable
        free = [
            server
            for server in candidates
            if self._num_requests.get(server.url, 0) < (1 if server.faults else self._concurrency)
        ]
        if free:
            return min(free, key=lambda server: (server.faults, server.load))
        if self._usable or self._returning:
            return None  # a slot may become free, or a server may return: both notify `_changed`
        if self._outdated:
            raise WeightsNeeded("; ".join(self._outdated.values()))
        raise EngineError("no SGLang server is left: " + "; ".join(self._lost.values()))

    def _drop(self, server: Server, reason: str) -> None:
        """Send no more requests to a server until it passes a health check and has the right weights."""
        # Several requests may fail on the same server; only the first of them finds it among the usable ones.
        if self._usable.pop(server.url, None) is not None:
            self._wait_for_return(server, reason)

    def _wait_for_return(self, server: Server, reason: str) -> None:
        self._returning[server.url] = asyncio.create_task(self._await_return(server, reason))

    async def _await_return(self, server: Server, reason: str) -> None:
        """Wait for a server, and make it usable, outdated or lost."""
        url = server.url
        try:
            found = await self._version_on_return(url, reason)
            if found == self._weight_version:
                server.faults = 0
                self._usable[url] = server
                logger.info("SGLang server %s is back", url)
            else:
                self._outdated[url] = f"{url} has weights {found!r} instead of {self._weight_version!r}"
                logger.warning("SGLang server %s", self._outdated[url])
        except EngineError as error:
            self._lost[url] = str(error)
        finally:
            # In `finally`, so that requests that wait for this server wake up in any case and see that it is gone.
            # No `await` between the new state and this line: another request may fail on a usable server at once, and
            # the task that then waits for it has the same key.
            del self._returning[url]
            async with self._changed:
                self._changed.notify_all()

    async def _version_on_return(self, url: str, reason: str) -> str:
        """Wait until a server passes a health check, and return its weight version.

        Raises:
            EngineError: it is not back within `return_timeout_s`, or will not be restarted.
        """
        deadline = time.monotonic() + self._return_timeout_s
        num_failed = 0
        while True:
            if self._supervisor and (failure := self._supervisor.failure(url)):
                raise EngineError(failure)
            try:
                return await _version_when_healthy(url)
            except (ServerFault, RequestRefused) as error:
                num_failed += 1
                if time.monotonic() > deadline:
                    event = f"{reason}, and was not back within {self._return_timeout_s:.0f} s"
                    raise EngineError(f"{event}: {error}") from error
            # Only once: a server whose restart also fails is restarted by its supervisor.
            if self._supervisor and num_failed == MAX_FAILED_PROBES:
                self._supervisor.restart(url, f"does not recover: {reason}")
            await asyncio.sleep(PROBE_INTERVAL_S)


async def _version_when_healthy(url: str) -> str:
    """Have a server compute a token, and return its weight version. Raises ServerFault, RequestRefused."""
    async with async_client() as client:
        await call_async(client, "GET", f"{url}/health_generate", timeout_s=HEALTH_TIMEOUT_S)
        model_info = await call_async(client, "GET", f"{url}/model_info", timeout_s=HEALTH_TIMEOUT_S)
        return parse_weight_version(model_info, url)
