"""Records the collectives that a rank issues, in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

Collective = tuple[str, tuple[int, ...]]  # its name, and the ranks that take part


class RecordedCollectives(TorchDispatchMode):
    """Records the collectives that are issued in the with-block, in forward and backward passes, of all libraries."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Collective] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Record the operator if it is a collective, and call it."""
        namespace, name, *_ = str(func).split(".")
        if namespace == "c10d" and name not in ("send", "recv_"):  # each of them is in an order of its own
            (group,) = (arg for arg in args if isinstance(arg, torch.ScriptObject) and _is_group(arg))
            self.seen.append((name, tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(group)))))
        return func(*args, **(kwargs or {}))


def _is_group(argument: torch.ScriptObject) -> bool:
    return str(argument._type()).endswith("ProcessGroup")  # the others are reduce operations


def in_common(ours: list[Collective], rank: int) -> list[Collective]:
    """Return those of a rank's collectives that another rank takes part in, in order."""
    return [collective for collective in ours if rank in collective[1]]
