"""New weights into running servers: in buckets, each checked, and a server that fails is left out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, Protocol, TypeVar

from safetensors import SafetensorError
from torch import Tensor

from megatron_vcr1.rollout.sglang.http import RequestRefused, ServerFault, call, weights_of

logger = logging.getLogger(__name__)

NamedTensors = list[tuple[str, Tensor]]
Prepared = TypeVar("Prepared")
LOADING = "loading"
"""Version of a server whose weights are partly new."""
LIVENESS_S = 15.0
"""Longest wait for the first sign of life: a hung server does not get the patience that a transfer needs."""


class Channel(Protocol[Prepared]):
    """How weights travel. Errors are ServerFault, RequestRefused, OSError or RuntimeError (torch.distributed's)."""

    def begin(self, url: str) -> None:
        """Make a server ready to receive."""
        ...

    def prepare(self, bucket: NamedTensors) -> Prepared:
        """What is done once for all servers; the result goes to `send`."""
        ...

    def send(self, url: str, prepared: Prepared) -> None:
        """Load a bucket into a server."""
        ...

    def finish(self, url: str) -> None:
        """Have the server put everything it got to use."""
        ...

    def abandon(self, url: str) -> None:
        """Leave a server that failed, at once and without an error."""
        ...


def buckets(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[NamedTensors]:
    """Groups of at most `max_bytes`; a larger tensor is one of its own."""
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
    """One transfer of all weights to some servers, side by side.

    Attributes:
        urls: the servers.
        failed: the servers that were left out on the way, and why; what they hold is undefined.
    """

    def __init__(self, urls: Sequence[str], weights: str, channel: Channel[Prepared], *, timeout_s: float) -> None:
        """
        Args:
            weights: the version that the servers report at the end.
            timeout_s: longest wait for an answer.
        """
        self.failed: dict[str, str] = {}
        self.urls = list(urls)
        self._weights = weights
        self._channel = channel
        self._timeout_s = timeout_s
        self._on_each(self._begin)

    @property
    def current(self) -> list[str]:
        """Servers that have not failed; after `finish`, those with the new weights."""
        return [url for url in self.urls if url not in self.failed]

    def send(self, bucket: NamedTensors) -> None:
        """Never raises for what goes wrong: the caller goes on with the collective that makes the next tensors."""
        if not self.current:
            return
        try:
            prepared = self._channel.prepare(bucket)
        except (OSError, RuntimeError, SafetensorError) as error:  # the disk, or shared memory, is full
            for url in self.current:
                self._leave_out(url, error)
            return
        self._on_each(lambda url: self._channel.send(url, prepared))

    def finish(self) -> None:
        """After the last bucket: the servers report the new version, which is checked, and serve again."""
        self._on_each(self._finish)
        for url in self.failed:
            with suppress(ServerFault, RequestRefused):  # no one asks it while its weights are `LOADING`
                call(url, "POST", "/continue_generation", {}, timeout_s=LIVENESS_S)

    def _begin(self, url: str) -> None:
        weights_of(url, timeout_s=LIVENESS_S)
        # Nothing may be sampled from weights that are half old and half new, nor be called old afterwards.
        self._post(url, "/pause_generation", {"mode": "abort"})
        self._post(url, "/update_weight_version", {"new_version": LOADING, "abort_all_requests": True})
        self._channel.begin(url)

    def _finish(self, url: str) -> None:
        self._channel.finish(url)
        self._post(url, "/flush_cache", None)
        self._post(url, "/update_weight_version", {"new_version": self._weights, "abort_all_requests": False})
        self._post(url, "/continue_generation", {})
        found = weights_of(url)
        if found != self._weights:
            raise ServerFault(f"{url} reports weights {found!r} after an update to {self._weights!r}", gone=False)

    def _post(self, url: str, path: str, body: object) -> None:
        call(url, "POST", path, body, timeout_s=self._timeout_s)

    def _on_each(self, action: Callable[[str], None]) -> None:
        def attempt(url: str) -> None:
            try:
                action(url)
            except (ServerFault, RequestRefused, OSError, RuntimeError) as error:
                self._leave_out(url, error)

        urls = self.current
        if urls:
            with ThreadPoolExecutor(len(urls)) as threads:
                list(threads.map(attempt, urls))

    def _leave_out(self, url: str, error: Exception) -> None:
        self.failed[url] = str(error)
        logger.warning("SGLang server %s is left out of the update to weights %s: %s", url, self._weights, error)
        self._channel.abandon(url)
