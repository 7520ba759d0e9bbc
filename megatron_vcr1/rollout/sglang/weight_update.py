"""One transfer of all weights to a set of servers, in buckets. Servers that fail are excluded; the others continue."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic

from safetensors import SafetensorError
from torch import Tensor

from megatron_vcr1.rollout.sglang.channels.base import LIVENESS_TIMEOUT_S, Channel, NamedTensors, Prepared
from megatron_vcr1.rollout.sglang.http import RequestRefused, ServerFault, call, weight_version
from megatron_vcr1.rollout.sglang.memory import RELEASED, WEIGHTS_ONLY

logger = logging.getLogger(__name__)

LOADING = "loading"
"""Weight version of a server while weights are loaded: some of them are new, others are old."""


def split_into_buckets(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[NamedTensors]:
    """Group consecutive tensors into buckets of at most `max_bytes`; a larger tensor gets a bucket of its own."""
    bucket: NamedTensors = []
    num_bytes = 0
    for name, tensor in tensors:
        if bucket and num_bytes + tensor.nbytes > max_bytes:
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append((name, tensor))
        num_bytes += tensor.nbytes
    if bucket:
        yield bucket


class WeightUpdate(Generic[Prepared]):
    """One transfer of all weights to a set of servers at the same time.

    The calls to each server, in order:

        begin     check that it responds; pause it and abort its requests; set its version to `LOADING`; `Channel.begin`
        send      `Channel.send`, for every bucket
        finish    `Channel.finish`; clear its prefix cache; set the new version; let it continue; check the version

    The version is `LOADING` before the first tensor is sent, and new only after the last one is in use. So if this
    process or the server dies at any point in between, mixed weights are never taken for the old or the new ones.

    A server that has memory for its weights only (`memory.WEIGHTS_ONLY`) keeps that marker and stays paused, until its
    other memory is resumed.

    Attributes:
        urls: the servers.
        failed: the servers that have failed so far, with the reasons. The contents of their weights are undefined.
    """

    def __init__(self, urls: Sequence[str], version: str, channel: Channel[Prepared], *, timeout_s: float) -> None:
        """Begin the transfer. Does not raise if servers fail; see `failed`.

        Args:
            urls: the servers.
            version: the weight version that the servers report at the end.
            channel: how the weights are sent.
            timeout_s: maximum time for a call to a server.
        """
        self.failed: dict[str, str] = {}
        self.urls = list(urls)
        self._version = version
        self._channel = channel
        self._timeout_s = timeout_s
        self._markers: dict[str, str] = {}  # prefixes of the servers' versions
        self._on_each_server(self._begin)

    @property
    def current(self) -> list[str]:
        """The servers that have not failed. After `finish`, they have the new weights."""
        return [url for url in self.urls if url not in self.failed]

    def send(self, bucket: NamedTensors) -> None:
        """Send a bucket to all servers that have not failed.

        It does not raise if a transfer fails. The caller must go on to iterate over the tensors in any case, because a
        collective of all ranks of the replica gathers each of them.
        """
        if not self.current:
            return
        try:
            prepared = self._channel.prepare(bucket)
        except (OSError, RuntimeError, SafetensorError) as error:  # the disk or shared memory is full
            for url in self.current:
                self._exclude(url, error)
            return
        self._on_each_server(lambda url: self._channel.send(url, prepared))

    def finish(self) -> None:
        """Complete the transfer after the last bucket: servers report the new version and continue. Does not raise."""
        self._on_each_server(self._finish)
        # Servers that have failed continue, too: nothing else would end their pause. Their version keeps clients away.
        for url in self.failed:
            if self._markers.get(url):
                continue  # the resume of its memory ends the pause
            with suppress(ServerFault, RequestRefused):
                call(url, "POST", "/continue_generation", {}, timeout_s=LIVENESS_TIMEOUT_S)

    def _begin(self, url: str) -> None:
        version = weight_version(url, timeout_s=LIVENESS_TIMEOUT_S)
        if version.startswith(RELEASED):
            raise ServerFault(f"{url}: the memory of its weights is released", unreachable=False)
        self._markers[url] = WEIGHTS_ONLY if version.startswith(WEIGHTS_ONLY) else ""
        # No response may be sampled from a mixture of old and new weights, or be attributed to the old ones afterwards.
        self._post(url, "/pause_generation", {"mode": "abort"})
        self._set_version(url, LOADING, abort=True)
        self._channel.begin(url)

    def _finish(self, url: str) -> None:
        self._channel.finish(url)
        self._post(url, "/flush_cache", None)  # prefixes in the cache were computed with the old weights
        self._set_version(url, self._version, abort=False)
        if not self._markers[url]:
            self._post(url, "/continue_generation", {})
        found = weight_version(url).removeprefix(WEIGHTS_ONLY)
        if found != self._version:
            raise ServerFault(
                f"{url} reports weights {found!r} after an update to {self._version!r}", unreachable=False
            )

    def _set_version(self, url: str, version: str, *, abort: bool) -> None:
        body = {"new_version": self._markers[url] + version, "abort_all_requests": abort}
        self._post(url, "/update_weight_version", body)

    def _post(self, url: str, path: str, body: object) -> None:
        call(url, "POST", path, body, timeout_s=self._timeout_s)

    def _on_each_server(self, action: Callable[[str], None]) -> None:
        """Run an action for all servers that have not failed, in one thread each, and exclude those that fail."""

        def attempt(url: str) -> None:
            try:
                action(url)
            except (ServerFault, RequestRefused, OSError, RuntimeError) as error:
                self._exclude(url, error)

        urls = self.current
        if urls:
            with ThreadPoolExecutor(len(urls)) as threads:
                list(threads.map(attempt, urls))

    def _exclude(self, url: str, error: Exception) -> None:
        self.failed[url] = str(error)
        logger.warning("SGLang server %s is excluded from the update to weights %s: %s", url, self._version, error)
        self._channel.abort(url)
