"""The engine whose responses come from SGLang servers."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress

import httpx
import torch
from torch import Tensor

from megatron_vcr1.config.rollout_sections import SglangSection
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.rollout.engine import EngineError, GenerationRequest, SamplingParams, WeightsNeeded
from megatron_vcr1.rollout.sglang import payload
from megatron_vcr1.rollout.sglang.delivery import WeightDelivery
from megatron_vcr1.rollout.sglang.fleet import Fleet, find_or_start_servers
from megatron_vcr1.rollout.sglang.http import INITIAL_WEIGHTS, RequestRefused, ServerFault, acall, call
from megatron_vcr1.rollout.sglang.loan import MemoryLoan
from megatron_vcr1.rollout.sglang.pool import Server, ServerPool
from megatron_vcr1.rollout.sglang.protocol import PromptEncoder, generate_body, read_group, version_name
from megatron_vcr1.rollout.sglang.weight_sync import buckets
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from megatron_vcr1.types import RolloutGroup

logger = logging.getLogger(__name__)

MAX_PASSES = 3
"""Of all weights to servers, before an update has failed."""


class SglangEngine:
    """A `RolloutEngine` on servers.

    One rank of each copy of the model talks to them; the others wait for what it hears. Where a server fails, another
    answers in its place, and it is started anew where this job started it. A server is asked only while it reports the
    policy's weights, and an answer counts only if all of it was sampled from them.

    `GenerationRequest.seed` has no effect: SGLang's sampling follows seeds only in a mode (deterministic inference)
    that is slower, and in which all responses of a group are the same.
    """

    def __init__(self, config: RunConfig, model_config: ModelConfig, tokens: SpecialTokens, fleet: Fleet) -> None:
        """Use `start`, which musters the fleet. The engine closes what the fleet started."""
        self._section = config.sglang
        self._encoder = PromptEncoder(model_config)
        self._tokens = tokens
        self._fleet = fleet
        folder = config.train.run_dir.absolute() / "sglang" / "weights" / f"copy_{mesh.replica_index()}"
        self._delivery = WeightDelivery(fleet, self._section, config.model.path, folder)
        self._loan = MemoryLoan(fleet.lenders, fleet.processes, timeout_s=self._section.request_timeout_s)
        self._version = self._num_updates = 0
        self._weights = INITIAL_WEIGHTS
        # What makes the policy's weights again. Not under one_step_off: there, training has changed them by then.
        self._source: Iterable[tuple[str, Tensor]] | None = None
        self._stopped = threading.Event()
        self._keeps_source = not config.grpo.one_step_off
        if fleet.talks and self._section.transport == "file":
            payload.remove_orphans()

    @classmethod
    def start(cls, config: RunConfig, model_config: ModelConfig, tokens: SpecialTokens) -> SglangEngine:
        """Start the servers, or find those that the settings name; every rank of the job calls it.

        Raises:
            UserError: a setting cannot work.
            EngineError: a server does not start or does not answer; says where its log is.
        """
        _empty_cache(config.sglang)  # servers divide what is free
        return cls(config, model_config, tokens, find_or_start_servers(config))

    @property
    def policy_version(self) -> int:
        return self._version

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[RolloutGroup]:
        """As `RolloutEngine.generate`."""
        self._stopped.clear()
        self._make_room()
        for _ in range(MAX_PASSES):
            try:
                return collectives.broadcast_within_replica(lambda: self.sample(requests, params))
            except WeightsNeeded as needed:
                if self._source is None:
                    raise EngineError(f"no server has the policy's weights before the next update: {needed}") from None
                self._bring_up(self._source)
        raise EngineError(f"the servers lost the policy's weights {MAX_PASSES} times in one call")

    def sample(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[RolloutGroup]:
        """`generate` on the talking rank alone, without collectives: for a thread beside the training.

        Raises:
            EngineError: as `generate`, or `abort` was called, and neither `generate` nor `update_weights` since.
            WeightsNeeded: no server has the policy's weights; `update_weights` brings them.
        """
        self._loan.take_back()
        try:
            return asyncio.run(self._sample(requests, params))
        except BaseException:
            self._abort_requests()
            raise
        finally:
            self._loan.lend()

    def abort(self) -> None:
        """Stop `sample` in another thread, even one that is only about to begin: nobody wants its answers any more."""
        self._stopped.set()
        self._abort_requests()

    def _abort_requests(self) -> None:
        """Have the servers sample nothing more, unless it may be for another copy: for that they see us hang up."""
        for url in self._fleet.urls if not self._fleet.shared else ():
            with suppress(ServerFault, RequestRefused):
                call(url, "POST", "/abort_request", {"abort_all": True}, timeout_s=5)

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """As `RolloutEngine.update_weights`; all ranks of the job call it, since copies may share servers.

        Args:
            tensors: if it can be iterated more than once (`checkpoint.hf_stream`'s can), servers that are started anew
                get the weights between updates, too.

        Raises:
            EngineError: no server could be brought to the version.
        """
        self._source = tensors if self._keeps_source and iter(tensors) is not tensors else None
        self._version, self._num_updates = version, self._num_updates + 1
        self._weights = version_name(version, f"{self._fleet.run}.{self._num_updates}")
        self._stopped.clear()
        self._make_room()
        collectives.gather_objects(
            None
        )  # no copy samples any more from servers that change, or holds memory that they take
        self._bring_up(tensors)

    def close(self) -> None:
        """End the servers that this process started; others are left as they are."""
        if self._fleet.processes is not None:
            self._fleet.processes.close()

    def _make_room(self) -> None:
        """Before colocated servers take memory back: this copy's ranks give up what torch keeps of it for later."""
        if _empty_cache(self._section):
            collectives.barrier_within_replica()

    def _bring_up(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Send weights until a server has them; all ranks of the copy call it."""
        try:
            for _ in range(MAX_PASSES):
                collectives.broadcast_within_replica(self._open_pass)
                for bucket in buckets(tensors, self._section.weight_sync_bucket_mb * 2**20):
                    self._delivery.send(bucket)
                if collectives.broadcast_within_replica(self._delivery.close):
                    return
                if iter(tensors) is tensors:
                    break  # used up
        finally:
            self._loan.lend()
        raise EngineError(f"no SGLang server took over the weights of version {self._version}; the log says why")

    def _open_pass(self) -> None:
        self._loan.take_back()
        self._delivery.await_servers()
        self._delivery.open(self._weights)

    async def _sample(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[RolloutGroup]:
        pool = ServerPool(
            self._delivery.current,
            self._delivery.absent,
            self._weights,
            concurrency=self._section.concurrency,
            return_timeout_s=self._section.startup_timeout_s,
            keeper=self._fleet.processes,
            is_stopped=self._stopped.is_set,
        )
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(limits=limits, trust_env=False) as client:
            tasks = [asyncio.create_task(self._group(pool, client, request, params)) for request in requests]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await pool.close()

    async def _group(
        self, pool: ServerPool, client: httpx.AsyncClient, request: GenerationRequest, params: SamplingParams
    ) -> RolloutGroup:
        timeout_s = self._section.request_timeout_s

        async def ask(server: Server) -> RolloutGroup:
            packed = await asyncio.to_thread(self._pack, request)
            try:
                body = generate_body(request, params, self._tokens, packed)
                answer = await acall(client, "POST", f"{server.url}/generate", body, timeout_s=timeout_s)
            finally:
                if packed is not None:
                    payload.remove_file(packed)
            return read_group(request, answer, self._weights, self._tokens)

        return await pool.ask(request.id, request.num_responses, ask)

    def _pack(self, request: GenerationRequest) -> str | None:
        pictures = self._encoder.payload(request.prompt, f"{self._weights} {self._fleet.run}")
        try:
            return None if pictures is None else payload.pack(pictures, self._section.transport)
        except OSError as error:
            raise EngineError(f"sglang.transport: {error}; free shared memory, or set it to 'inline'") from error


def _empty_cache(section: SglangSection) -> bool:
    """Have torch give up memory that it keeps for later, where servers need it; whether they do."""
    if not (section.colocated and torch.cuda.is_available()):
        return False
    torch.cuda.empty_cache()
    return True
