"""Which server answers what: least-loaded routing, retries, and servers that drop out and come back."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import httpx

from megatron_vcr1.rollout.engine import EngineError, WeightsNeeded
from megatron_vcr1.rollout.sglang.http import LOOK_S, RequestRefused, ServerFault, acall, weights_in

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

MAX_TRIES = 5
"""Of one request, before its failure is the engine's."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0
PROBE_S = 1.0
"""Between two looks at a server that has dropped out."""
MAX_FAILED_LOOKS = 5
"""After so many its process is started anew (a process that is just starting is left alone)."""


class UnusableAnswer(Exception):
    """The server answered, but not with what was asked for; asking again may help."""


class OtherWeights(UnusableAnswer):
    """The server samples from other weights than the policy's."""


@dataclass(slots=True)
class Server:
    """One server, as its client knows it."""

    url: str
    load: int = 0
    """Responses under way."""
    faults: int = 0
    """In a row."""


class Keeper(Protocol):
    """Who looks after the servers' processes (`ServerGroup`), where that is this process."""

    def failure(self, url: str) -> str | None: ...

    def restart(self, url: str, reason: str) -> None: ...


class ServerPool:
    """The servers of one call of `generate`. Belongs to one event loop."""

    def __init__(
        self,
        current: Sequence[str],
        absent: Sequence[str],
        weights: str,
        *,
        concurrency: int,
        return_timeout_s: float,
        keeper: Keeper | None = None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            current: URLs of servers that have the policy's weights.
            absent: of those that are restarting, or were left out; asked once they are back with these weights.
            weights: the version that a server must report.
            concurrency: requests under way at once on a server.
            return_timeout_s: longest wait for a server that dropped out.
            is_stopped: whether answers are still wanted; looked at before every try.
        """
        self._weights = weights
        self._concurrency = concurrency
        self._return_timeout_s = return_timeout_s
        self._keeper = keeper
        self._is_stopped = is_stopped
        self._usable = {url: Server(url) for url in current}
        self._returning: dict[str, asyncio.Task[None]] = {}
        self._requests: dict[str, int] = {}
        self._lost: dict[str, str] = {}
        self._outdated: dict[str, str] = {}
        self._changed = asyncio.Condition()
        for url in absent:
            self._expect(Server(url), f"{url} was left out")

    async def ask(self, name: str, num_responses: int, ask: Callable[[Server], Awaitable[Answer]]) -> Answer:
        """Have one of the servers answer, and another, or the same again, where it fails.

        Args:
            name: of the request, for messages.
            num_responses: its weight in routing.

        Raises:
            EngineError: a server refuses the request, or all tries failed, or no server is left.
            WeightsNeeded: see there.
        """
        failures: list[str] = []
        tried: set[str] = set()
        for number in range(MAX_TRIES):
            if failures:
                # Full jitter: requests that failed together do not come back together.
                await asyncio.sleep(random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**number)))
            if self._is_stopped():
                raise EngineError("sampling was stopped")
            async with self._server(num_responses, tried) as server:
                tried.add(server.url)
                try:
                    answer = await ask(server)
                except RequestRefused as error:
                    raise EngineError(f"sample {name}: {error}") from error
                except (ServerFault, UnusableAnswer) as error:
                    failures.append(f"{server.url}: {error}")
                    logger.warning("sample %s, try %d of %d: %s", name, number + 1, MAX_TRIES, failures[-1])
                    server.faults += 1
                    if isinstance(error, OtherWeights) or (isinstance(error, ServerFault) and error.gone):
                        self._drop(server, str(error))
                else:
                    server.faults = 0
                    return answer
        raise EngineError(f"sample {name}: {MAX_TRIES} tries failed: " + "; ".join(failures))

    async def close(self) -> None:
        """Stop looking after servers that dropped out."""
        for task in self._returning.values():
            task.cancel()
        await asyncio.gather(*self._returning.values(), return_exceptions=True)

    @asynccontextmanager
    async def _server(self, num_responses: int, tried: Set[str]) -> AsyncIterator[Server]:
        async with self._changed:
            while (server := self._choose(tried)) is None:
                await self._changed.wait()
            server.load += num_responses
            self._requests[server.url] = self._requests.get(server.url, 0) + 1
        try:
            yield server
        finally:
            server.load -= num_responses
            self._requests[server.url] -= 1
            async with self._changed:
                self._changed.notify_all()

    def _choose(self, tried: Set[str]) -> Server | None:
        """The least-loaded usable server with a free place; None to wait for one. Raises where none will come.

        One that fails at once is always the least loaded. So a server whose last answer was a fault gets one request at
        a time, after the others, and none twice that another server could take.
        """
        usable = list(self._usable.values())
        others = [one for one in usable if one.url not in tried] or usable
        free = [one for one in others if self._requests.get(one.url, 0) < (1 if one.faults else self._concurrency)]
        if free:
            return min(free, key=lambda one: (one.faults, one.load))
        if self._usable or self._returning:
            return None
        if self._outdated:
            raise WeightsNeeded("; ".join(self._outdated.values()))
        raise EngineError("no SGLang server is left: " + "; ".join(self._lost.values()))

    def _drop(self, server: Server, reason: str) -> None:
        """Ask the server nothing more until it has shown that it lives and has the right weights."""
        if self._usable.pop(server.url, None) is not None:
            self._expect(server, reason)

    def _expect(self, server: Server, reason: str) -> None:
        self._returning[server.url] = asyncio.create_task(self._await_return(server, reason))

    async def _await_return(self, server: Server, reason: str) -> None:
        """Move a server to the usable, the outdated or the lost ones."""
        url = server.url
        try:
            found = await self._weights_on_return(url, reason)
            if found == self._weights:
                server.faults = 0
                self._usable[url] = server
                logger.info("SGLang server %s is back", url)
            else:
                self._outdated[url] = f"{url} has weights {found!r} instead of {self._weights!r}"
                logger.warning("SGLang server %s", self._outdated[url])
        except EngineError as error:
            self._lost[url] = str(error)
        finally:
            async with self._changed:
                del self._returning[url]
                self._changed.notify_all()

    async def _weights_on_return(self, url: str, reason: str) -> str:
        """The version of a server that was dropped for a reason, once it answers. Raises EngineError if it does not."""
        deadline = time.monotonic() + self._return_timeout_s
        num_failed = 0
        while True:
            if self._keeper and (lost := self._keeper.failure(url)):
                raise EngineError(lost)
            try:
                return await _weights_when_ready(url)
            except (ServerFault, RequestRefused) as error:
                num_failed += 1
                if time.monotonic() > deadline:
                    patience = f"{reason}, and was not back within {self._return_timeout_s:.0f} s"
                    raise EngineError(f"{patience}: {error}") from error
            if self._keeper and num_failed == MAX_FAILED_LOOKS:
                self._keeper.restart(url, f"does not recover: {reason}")
            await asyncio.sleep(PROBE_S)


async def _weights_when_ready(url: str) -> str:
    """The version of a server that has just computed something. Raises ServerFault, RequestRefused."""
    async with httpx.AsyncClient(trust_env=False) as client:
        await acall(client, "GET", f"{url}/health_generate", timeout_s=LOOK_S)
        return weights_in(await acall(client, "GET", f"{url}/model_info", timeout_s=LOOK_S), url)
