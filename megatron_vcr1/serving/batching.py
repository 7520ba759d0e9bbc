"""Batches the requests of all clients into calls of the engine, in the one thread that owns the device."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from megatron_vcr1.data.encoding import EncodedPrompt
from megatron_vcr1.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams
from megatron_vcr1.types import RolloutGroup

_POLL_S = 0.2

log = logging.getLogger(__name__)


class ServerStopping(RuntimeError):
    """The server stops before it could generate the response."""


@dataclass(frozen=True, slots=True)
class PendingPrompt:
    """A prompt that waits for its responses.

    Attributes:
        num_responses: number of responses to sample.
        result: receives the responses. The HTTP side cancels it when the client leaves: a cancelled prompt is dropped
            unless its batch is already running.
    """

    prompt: EncodedPrompt
    params: SamplingParams
    num_responses: int
    seed: int
    result: Future[RolloutGroup] = field(default_factory=Future)


class Batcher:
    """Collects waiting prompts into batches and generates their responses.

    `submit` and `stop` may be called from any thread. `run` is called once, by the thread that owns the device.
    """

    def __init__(self, engine: RolloutEngine, prompts_per_batch: int) -> None:
        self._engine = engine
        self._prompts_per_batch = prompts_per_batch
        self._waiting: queue.Queue[PendingPrompt] = queue.Queue()
        self._stopped = threading.Event()

    def submit(self, pending: PendingPrompt) -> None:
        """Queue a prompt; its `result` is set later by the thread in `run`."""
        self._waiting.put(pending)
        if self._stopped.is_set():  # `run` may have emptied the queue for the last time
            self.refuse_waiting()

    def run(self) -> None:
        """Generate responses until `stop` is called; prompts that are still waiting then fail with ServerStopping."""
        try:
            while not self._stopped.is_set():
                for batch in self._next_batches():
                    self._generate(batch)
        finally:
            self._stopped.set()
            self.refuse_waiting()

    def stop(self) -> None:
        """Let `run` return after the batch that is running."""
        self._stopped.set()

    def _next_batches(self) -> Iterator[list[PendingPrompt]]:
        """Take the prompts that wait now, grouped by sampling parameters, which a call of the engine shares."""
        taken: list[PendingPrompt] = []
        try:
            taken.append(self._waiting.get(timeout=_POLL_S))
            while len(taken) < self._prompts_per_batch:
                taken.append(self._waiting.get_nowait())
        except queue.Empty:
            pass
        # From here on, a client that leaves can no longer cancel its prompt. False means that it already has.
        taken = [pending for pending in taken if pending.result.set_running_or_notify_cancel()]
        for params in dict.fromkeys(pending.params for pending in taken):
            yield [pending for pending in taken if pending.params == params]

    def _generate(self, batch: list[PendingPrompt]) -> None:
        requests = [
            GenerationRequest(str(index), pending.prompt, pending.num_responses, pending.seed)
            for index, pending in enumerate(batch)
        ]
        try:
            groups = self._engine.generate(requests, batch[0].params)
        except Exception as error:  # every client of the batch gets the error, and the server goes on
            log.exception("%d requests failed", len(batch))
            for pending in batch:
                pending.result.set_exception(error)
            return
        except BaseException:  # Ctrl-C: the server ends, and no client may be left waiting
            for pending in batch:
                pending.result.set_exception(ServerStopping("the server was interrupted"))
            raise
        for pending, group in zip(batch, groups, strict=True):
            pending.result.set_result(group)

    def refuse_waiting(self) -> None:
        """Fail all prompts that wait, with ServerStopping."""
        while True:
            try:
                pending = self._waiting.get_nowait()
            except queue.Empty:
                return
            if pending.result.set_running_or_notify_cancel():
                pending.result.set_exception(ServerStopping("the server is shutting down"))
