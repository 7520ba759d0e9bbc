"""Patches that let megatron-core run on a machine without CUDA, over gloo.

megatron-core asks for the current CUDA device, keeps its random states on it, passes ``device="cuda"`` in places, and
its optimizers recognize parameters by the names of CUDA's tensor types. `install` patches torch and megatron-core to
use the CPU instead. The patches cannot be undone; only `model.cpu.install` calls it, and only without CUDA.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_OPTIMIZERS = "megatron.core.optimizer"
_installed = False


class CudaMeansCpu(TorchFunctionMode):
    """A torch function mode that reads ``device="cuda"`` as the CPU in every torch call.

    It also turns ``Tensor.cuda()`` into a no-op, and lets megatron-core's optimizers see CUDA's tensor types in
    ``Tensor.type()``. torch keeps function modes per thread: `install` enters it in the thread that calls it, and
    another thread that runs a model must enter a mode of its own (``with CudaMeansCpu():``).
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs and _calling_module().startswith(_OPTIMIZERS):
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if (
            kwargs
            and "device" in kwargs
            and kwargs["device"] is not None
            and torch.device(kwargs["device"]).type == "cuda"
        ):
            kwargs = {**kwargs, "device": _CPU}
        return func(*args, **(kwargs or {}))


def _calling_module() -> str:
    """Return the name of the module that made the torch call: two frames up, above `__torch_function__`."""
    return str(sys._getframe(2).f_globals.get("__name__"))


def install() -> None:
    """Patch torch and megatron-core in this process, and enter `CudaMeansCpu` in this thread; once."""
    global _installed
    if _installed:
        return
    _installed = True
    _keep_random_states_on_cpu()  # first: it imports megatron-core, which must still find torch unpatched
    _patch_torch_cuda()
    CudaMeansCpu().__enter__()  # never exited: it holds until the process ends


def _patch_torch_cuda() -> None:
    from megatron_vcr1.parallel import megatron_compat

    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    # A separate function for each: torch.compile keeps a table of torch's functions and refuses duplicates.
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.set_device = lambda device: None
    megatron_compat.patch_current_stream()
    torch.cuda.nvtx.range_push = lambda message: None
    torch.cuda.nvtx.range_pop = lambda: None
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda new_state, device=None: torch.set_rng_state(new_state)
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]


def _keep_random_states_on_cpu() -> None:
    import megatron.core.tensor_parallel.random as mcore_random

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    @contextlib.contextmanager
    def fork(tracker: Any, name: str = mcore_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        # megatron-core's fork() warns if the CPU generator advances while a CUDA state is forked; here the two are the
        # same generator.
        if name not in tracker.states_:
            raise KeyError(f"random state {name!r} is not registered; call parallel.mesh.initialize first")
        outer = torch.get_rng_state()
        torch.set_rng_state(tracker.states_[name])
        try:
            yield
        finally:
            tracker.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)

    mcore_random._get_cuda_rng_state = get_state
    mcore_random._set_cuda_rng_state = set_state
    mcore_random.CudaRNGStatesTracker.fork = fork
