"""The interface of a weight channel, and the calls that open and close a weight update in a server."""

from __future__ import annotations

from typing import Protocol, TypeVar

from torch import Tensor

from megatron_vcr1.rollout.sglang.http import RequestRefused, call

NamedTensors = list[tuple[str, Tensor]]
Prepared = TypeVar("Prepared")
LIVENESS_TIMEOUT_S = 15.0
"""Maximum wait for a server's first response, and for the server's part of a clean-up.

It is much shorter than the timeout of a transfer: a server that hangs must not delay the others for that long.
"""


class Channel(Protocol[Prepared]):
    """A way of sending weights to servers.

    `WeightUpdate` makes the calls, in this order: `begin` for every server; then for every bucket `prepare` once and
    `send` for every server; finally `finish` for every server. Calls for different servers run at the same time, in
    threads; calls for the same server never overlap. As soon as a call fails for a server, `abort` is called for it,
    and nothing more.

    Methods raise ServerFault, RequestRefused, OSError or RuntimeError (torch.distributed's).
    """

    def begin(self, url: str) -> None:
        """Make a server ready to receive: open its weight update and connect to it, where the channel needs that."""
        ...

    def prepare(self, bucket: NamedTensors) -> Prepared:
        """Do the part of sending a bucket that is the same for all servers; the result is passed to `send`."""
        ...

    def send(self, url: str, prepared: Prepared) -> None:
        """Transfer a prepared bucket to a server, and return when the server has received it."""
        ...

    def finish(self, url: str) -> None:
        """Make a server use everything that it has received, and release what `begin` has acquired for it."""
        ...

    def abort(self, url: str) -> None:
        """Release what `begin` has acquired for a server that has failed, without waiting for it and without raising.

        The server may be gone, or still wait inside of a transfer. Also called if `begin` itself has failed.
        """
        ...


def open_weight_update(url: str, timeout_s: float) -> None:
    """Open a weight update in a server: SGLang takes tensors only between this call and `close_weight_update`."""
    try:
        call(url, "POST", "/begin_weight_update", {}, timeout_s=timeout_s)
    except RequestRefused:  # an update that was interrupted is still open
        close_weight_update(url, timeout_s)
        call(url, "POST", "/begin_weight_update", {}, timeout_s=timeout_s)


def close_weight_update(url: str, timeout_s: float) -> None:
    """Close the weight update of a server."""
    call(url, "POST", "/end_weight_update", {}, timeout_s=timeout_s)
