"""The engine whose responses come from SGLang servers."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import torch
from torch import Tensor

from megatron_vcr1.config.model_sections import ModelSection
from megatron_vcr1.config.rollout_sections import SglangSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig, TextConfig
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.rollout.engine import EngineError, GenerationRequest, SamplingParams, WeightsNeeded
from megatron_vcr1.rollout.placement import Placement
from megatron_vcr1.rollout.sglang import payload
from megatron_vcr1.rollout.sglang.fleet import Fleet, find_or_start_servers
from megatron_vcr1.rollout.sglang.http import (
    INITIAL_WEIGHTS,
    RequestRefused,
    ServerFault,
    async_client,
    call,
    call_async,
)
from megatron_vcr1.rollout.sglang.memory import MemoryRelease
from megatron_vcr1.rollout.sglang.pool import Server, ServerPool
from megatron_vcr1.rollout.sglang.protocol import PromptEncoder, generate_body, read_group, version_name
from megatron_vcr1.rollout.sglang.weight_sync import WeightSync, find_device_channel
from megatron_vcr1.rollout.sglang.weight_update import split_into_buckets
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from megatron_vcr1.types import RolloutGroup

logger = logging.getLogger(__name__)

MAX_SYNC_PASSES = 3
"""Attempts to send all weights to the servers, after which an update fails."""


class SglangEngine:
    """A `RolloutEngine` on SGLang servers.

    The leader of each replica talks to the servers, and broadcasts their responses to the other ranks of the replica,
    which wait in a collective meanwhile. If a server fails, another one takes over its requests, and it is restarted if
    this job started it. A server gets requests only while it reports the policy's weight version, and a response counts
    only if all of its tokens were sampled from those weights.

    Threads: without one step off, only the main thread calls the engine. With one step off, a second thread of the
    leader calls `sample` while the main thread trains; the main thread then only calls `abort`, and calls
    `update_weights` or `generate` after that thread has finished. No collectives run outside of the main thread.

    `GenerationRequest.seed` has no effect. SGLang uses seeds only with deterministic inference, which is slower and
    makes all responses of a group equal.
    """

    def __init__(
        self,
        section: SglangSection,
        model_config: ModelConfig,
        tokens: SpecialTokens,
        fleet: Fleet,
        weight_sync: WeightSync,
        *,
        weights_change_while_sampling: bool,
    ) -> None:
        """Use `start`, which finds or starts the servers. The engine closes the processes of the fleet."""
        self._section = section
        self._encoder = PromptEncoder(model_config)
        self._tokens = tokens
        self._fleet = fleet
        self._weight_sync = weight_sync
        self._memory = MemoryRelease(fleet.releasing, fleet.processes, timeout_s=section.request_timeout_s)
        self._version = self._num_updates = 0
        self._weight_version = INITIAL_WEIGHTS
        # The stream of the policy's weights, to bring a restarted server up to date between two updates. Not kept if
        # training changes the weights while servers sample (one step off): the stream would give newer weights.
        self._weight_stream: Iterable[tuple[str, Tensor]] | None = None
        self._keeps_weight_stream = not weights_change_while_sampling
        self._aborted = threading.Event()
        self._cancel_requests: Callable[[], object] | None = None  # while `sample` runs
        if fleet.is_leader and section.transport == "file":
            try:
                payload.remove_orphans()
            except OSError as error:
                raise EngineError(f"sglang.transport = 'file': {error}; or set it to 'inline'") from error

    @classmethod
    def start(
        cls,
        section: SglangSection,
        model: ModelSection,
        model_config: ModelConfig,
        tokens: SpecialTokens,
        *,
        run_dir: Path,
        seed: int,
        weights_change_while_sampling: bool = False,
    ) -> SglangEngine:
        """Start the servers, or find those that the settings name. Every rank of the job must call it.

        Args:
            section: settings of the servers.
            model: path and dtype of the model.
            model_config: configuration of the model.
            tokens: end tokens, and tokens that are never sampled.
            run_dir: run directory; servers' logs and weights that travel by disk go to its subfolder sglang.
            seed: the run's seed, for servers that are started.
            weights_change_while_sampling: training updates the weights while servers sample (one step off).

        Raises:
            UserError: a setting cannot work.
            EngineError: a server does not start or does not respond; the message says where its log is.
        """
        _check_experts(model_config.text)
        # A server allocates memory according to what is free on the GPU when it starts.
        _empty_cuda_cache(Placement.from_section(section))
        fleet = find_or_start_servers(section, model, run_dir=run_dir, seed=seed)
        folder = run_dir.absolute() / "sglang" / "weights" / f"replica_{mesh.replica_index()}"
        weight_sync = WeightSync(fleet, section, model.path, folder, find_device_channel(fleet, section))
        return cls(
            section,
            model_config,
            tokens,
            fleet,
            weight_sync,
            weights_change_while_sampling=weights_change_while_sampling,
        )

    @property
    def policy_version(self) -> int:
        return self._version

    def generate(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[RolloutGroup]:
        """Sample responses, as `RolloutEngine.generate` does."""
        self._aborted.clear()
        self._free_gpu_memory()
        for _ in range(MAX_SYNC_PASSES):
            try:
                return collectives.broadcast_within_replica(lambda: self.sample(requests, params))
            except WeightsNeeded as needed:  # raised on all ranks of the replica, so all of them call `_sync_weights`
                if self._weight_stream is None:
                    raise EngineError(f"no server has the policy's weights before the next update: {needed}") from None
                self._sync_weights(self._weight_stream)
        raise EngineError(f"the servers lost the policy's weights {MAX_SYNC_PASSES} times in one call")

    def sample(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[RolloutGroup]:
        """Sample responses on the replica leader alone, without collectives, so that a second thread can call it.

        Raises:
            EngineError: as for `generate`; also if `abort` was called since the last `generate` or `update_weights`.
            WeightsNeeded: no server has the policy's weights; call `update_weights`.
        """
        self._memory.resume()
        try:
            return asyncio.run(self._sample(requests, params))
        except BaseException:
            self._abort_requests()
            raise
        finally:
            payload.remove_own_files()  # of requests that were cancelled while a thread packed them
            self._memory.release()

    def abort(self) -> None:
        """Stop `sample` in another thread, even if that thread has not reached it yet. Its responses are discarded."""
        self._aborted.set()  # before the next line: requests that start after it check the event
        if (cancel := self._cancel_requests) is not None:
            with suppress(RuntimeError):  # the event loop has just been closed
                cancel()

    def _abort_requests(self) -> None:
        """Make the servers drop all requests, unless they are shared with other replicas.

        Shared servers drop only our requests, a few seconds after our connections have been closed.
        """
        for url in self._fleet.urls if not self._fleet.shared else ():
            with suppress(ServerFault, RequestRefused):
                call(url, "POST", "/abort_request", {"abort_all": True}, timeout_s=5)

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Send the policy's weights to the servers. All ranks of the job must call it: replicas may share servers.

        The order of the collectives, on every rank: a barrier of the replica if servers share GPU memory, a gather of
        all ranks, and then the collectives of `_sync_weights`.

        Args:
            tensors: the weights, as for `RolloutEngine.update_weights`. If they can be iterated more than once (as
                the stream of `checkpoint.hf_stream` can), servers that restart get the weights between updates, too.
            version: the new policy version.

        Raises:
            EngineError: no server could take over the weights.
        """
        self._weight_stream = tensors if self._keeps_weight_stream and iter(tensors) is not tensors else None
        self._version, self._num_updates = version, self._num_updates + 1
        # The number of the update makes the name unique: a run that loads a checkpoint may set a policy version again.
        self._weight_version = version_name(version, f"{self._fleet.job_id}.{self._num_updates}")
        self._aborted.clear()
        self._free_gpu_memory()
        # A barrier of the job. After it, no replica samples from servers that are about to change, and every rank has
        # freed the GPU memory that the servers resume.
        collectives.gather_objects(None)
        self._sync_weights(tensors)

    def close(self) -> None:
        """End the servers that this process started; other servers keep running."""
        if self._fleet.processes is not None:
            self._fleet.processes.close()

    def _free_gpu_memory(self) -> None:
        """Free torch's cached memory on all ranks of the replica, before colocated servers resume theirs."""
        if _empty_cuda_cache(self._fleet.placement):
            collectives.barrier_within_replica()

    def _sync_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Send weights until at least one server has them. All ranks of the replica must call it.

        Each pass runs: a broadcast of the outcome of `_begin_pass`; the collectives that gather the tensors of a bucket
        and those of `WeightSync.send`, in turn; a broadcast of whether a server has the weights.

        Colocated servers resume the memory of their weights first; `sample` resumes the rest, when the memory of the
        buckets is free again. They keep it until the end of `sample`: to release the weights here would move them
        through the host for nothing. Call `generate` or `sample` before anything trains, on replicas without requests,
        too.
        """
        is_synced = False
        try:
            for _ in range(MAX_SYNC_PASSES):
                collectives.broadcast_within_replica(self._begin_pass)
                for bucket in split_into_buckets(tensors, self._section.weight_sync_bucket_mb * 2**20):
                    self._weight_sync.send(bucket)
                    del bucket  # before the next one is gathered
                is_synced = collectives.broadcast_within_replica(self._weight_sync.end)
                if is_synced:
                    return
                if iter(tensors) is tensors:
                    break  # an iterator, which is exhausted now
        finally:
            if not is_synced:
                self._memory.release()
        raise EngineError(f"no SGLang server took over the weights of version {self._version}; the log says why")

    def _begin_pass(self) -> None:
        self._memory.resume_weights()
        self._weight_sync.wait_for_server()
        self._weight_sync.begin(self._weight_version)

    async def _sample(self, requests: Sequence[GenerationRequest], params: SamplingParams) -> list[RolloutGroup]:
        pool = ServerPool(
            self._weight_sync.current,
            self._weight_sync.outdated,
            self._weight_version,
            concurrency=self._section.concurrency,
            return_timeout_s=self._section.startup_timeout_s,
            supervisor=self._fleet.processes,
            is_aborted=self._aborted.is_set,
        )
        async with async_client() as client:
            tasks = [asyncio.create_task(self._sample_group(pool, client, request, params)) for request in requests]
            responses = asyncio.gather(*tasks)
            self._cancel_requests = partial(asyncio.get_running_loop().call_soon_threadsafe, responses.cancel)
            try:
                return list(await responses)
            except asyncio.CancelledError:
                if not self._aborted.is_set():
                    raise
                raise EngineError("sampling was aborted") from None
            finally:
                self._cancel_requests = None
                # After an error, `gather` leaves the other requests running: cancel them, and close their connections.
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await pool.close()

    async def _sample_group(
        self, pool: ServerPool, client: httpx.AsyncClient, request: GenerationRequest, params: SamplingParams
    ) -> RolloutGroup:
        timeout_s = self._section.request_timeout_s

        async def send(server: Server) -> RolloutGroup:
            packed = await asyncio.to_thread(self._pack, request)
            try:
                body = generate_body(request, params, self._tokens, packed)
                response = await call_async(client, "POST", f"{server.url}/generate", body, timeout_s=timeout_s)
            finally:
                if packed is not None:
                    payload.remove_file(packed)
            return read_group(request, response, params, self._weight_version, self._tokens)

        return await pool.run(request.id, request.num_responses, send)

    def _pack(self, request: GenerationRequest) -> str | None:
        """Pack the images and videos of a prompt for its request; None for a prompt of text alone."""
        contents = self._encoder.payload(request.prompt, f"{self._weight_version} {self._fleet.job_id}")
        try:
            return None if contents is None else payload.pack(contents, self._section.transport)
        except OSError as error:
            raise EngineError(
                f"sglang.transport = 'file': {error}; free shared memory, or set it to 'inline'"
            ) from error


def _check_experts(text: TextConfig) -> None:
    """Refuse a model of which some layers have experts: SGLang gives all layers experts, and ignores their weights."""
    if text.experts is not None and len(text.experts.layers) < text.num_layers:
        raise UserError(
            f"rollout.engine = 'sglang': {len(text.experts.layers)} of the model's {text.num_layers} layers have "
            "experts, and SGLang supports experts in every layer only; set rollout.engine = 'local'"
        )


def _empty_cuda_cache(placement: Placement) -> bool:
    """Free torch's cached GPU memory if the servers share it; return whether they do."""
    if placement.shares_gpu_memory:
        torch.cuda.ipc_collect()  # buckets that servers have read since they were freed
        torch.cuda.empty_cache()
    return placement.shares_gpu_memory
