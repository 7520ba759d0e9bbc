"""Batches the requests of all clients into calls of the engine, in the one thread that owns the device."""

from __future__ import annotations

import logging
import queue
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from megatron_vcr1.data.encoding import EncodedPrompt
from megatron_vcr1.rollout.engine import GenerationRequest, SamplingParams
from megatron_vcr1.rollout.local.engine import LocalEngine
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
        on_token: called in the device's thread with the index of a response and its next token, as soon as the token
            is sampled.
    """

    prompt: EncodedPrompt
    params: SamplingParams
    num_responses: int
    seed: int
    result: Future[RolloutGroup] = field(default_factory=Future)
    on_token: Callable[[int, int], None] | None = None


class Batcher:
    """Collects waiting prompts into batches and generates their responses.

    `submit` and `stop` may be called from any thread. `run` is called once, by the thread that owns the device.
    """

    def __init__(self, engine: LocalEngine, prompts_per_batch: int) -> None:
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
                taken = self._take_waiting()
                try:
                    for params in dict.fromkeys(pending.params for pending in taken):
                        if self._stopped.is_set():
                            break
                        self._generate([pending for pending in taken if pending.params == params])
                finally:  # after `stop`, or Ctrl-C: no client may be left waiting
                    for pending in taken:
                        if not pending.result.done():
                            pending.result.set_exception(ServerStopping("the server is shutting down"))
        finally:
            self._stopped.set()
            self.refuse_waiting()

    def stop(self) -> None:
        """Let `run` return after the batch that is running."""
        self._stopped.set()

    def _take_waiting(self) -> list[PendingPrompt]:
        """Take the prompts that wait now, at most `prompts_per_batch`."""
        taken: list[PendingPrompt] = []
        try:
            taken.append(self._waiting.get(timeout=_POLL_S))
            while len(taken) < self._prompts_per_batch:
                taken.append(self._waiting.get_nowait())
        except queue.Empty:
            pass
        # From here on, a client that leaves can no longer cancel its prompt. False means that it already has.
        return [pending for pending in taken if pending.result.set_running_or_notify_cancel()]

    def _generate(self, batch: list[PendingPrompt]) -> None:
        """Generate the responses of prompts with equal sampling parameters, which a call of the engine shares."""
        requests = [
            GenerationRequest(str(index), pending.prompt, pending.num_responses, pending.seed)
            for index, pending in enumerate(batch)
        ]

        begun: set[int] = set()  # prompts of which a token has been streamed

        def on_token(request: int, response: int, token_id: int) -> None:
            if (receive := batch[request].on_token) is not None:
                begun.add(request)
                receive(response, token_id)

        streams = any(pending.on_token is not None for pending in batch)
        try:
            groups = self._engine.generate(requests, batch[0].params, on_token=on_token if streams else None)
        except Exception as error:  # the clients get the error, and the server goes on
            log.exception("a batch of %d prompts failed", len(batch))
            # The error's frames hold the batch's KV cache. The memory is needed below.
            traceback.clear_frames(error.__traceback__)
            for index, pending in enumerate(batch):
                # One prompt may be the cause, or they need too much memory together.
                if len(batch) > 1 and index not in begun and not self._stopped.is_set():
                    self._generate([pending])
                else:
                    pending.result.set_exception(error)
            return
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
