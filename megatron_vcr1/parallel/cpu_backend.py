"""megatron-core on a machine without CUDA, over gloo.

megatron-core asks for the current CUDA device, keeps its random states on it, writes ``device="cuda"`` in places, and
its optimizers know parameters by the names of CUDA's tensor types.
Where CUDA is missing, `install` answers those questions with the CPU. Where CUDA exists it does nothing at all.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_OPTIMIZERS = "megatron.core.optimizer"
_installed = False


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites ``device="cuda"`` and ``Tensor.cuda()`` in every torch call, ``Tensor.type()`` for the optimizers."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs and _caller().startswith(_OPTIMIZERS):
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if (
            kwargs
            and "device" in kwargs
            and kwargs["device"] is not None
            and torch.device(kwargs["device"]).type == "cuda"
        ):
            kwargs = {**kwargs, "device": _CPU}
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The module that made the torch call."""
    return str(sys._getframe(2).f_globals.get("__name__"))


def install() -> None:
    """Make megatron-core run on the CPU; a no-op where CUDA exists, and when called again."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    _keep_random_states_on_cpu()  # imports megatron-core, which must still find torch as it is
    _answer_cuda_questions()
    _stand_in_for_apex()
    _CudaMeansCpu().__enter__()


def _answer_cuda_questions() -> None:
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    # One function each: torch.compile keeps a table of torch's functions and takes no function twice.
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None
    torch.cuda.set_device = lambda device: None
    torch.cuda.nvtx.range_push = lambda message: None
    torch.cuda.nvtx.range_pop = lambda: None
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda new_state, device=None: torch.set_rng_state(new_state)
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]


def _stand_in_for_apex() -> None:
    """Weight gradients that are added to their buffer: on a GPU an extension that comes with Apex."""
    import megatron.core.tensor_parallel.layers as mcore_layers

    def add_weight_gradient(x: torch.Tensor, grad_output: torch.Tensor, weight_grad: torch.Tensor) -> None:
        if x.dtype == weight_grad.dtype:
            weight_grad.addmm_(grad_output.t(), x)
        else:
            weight_grad.add_(grad_output.t() @ x)

    mcore_layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=add_weight_gradient)
    mcore_layers._grad_accum_fusion_available = True


def _keep_random_states_on_cpu() -> None:
    import megatron.core.tensor_parallel.random as mcore_random

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    @contextlib.contextmanager
    def fork(tracker: Any, name: str = mcore_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        # The stock tracker warns when the CPU generator moves while a CUDA state is forked; here they are one
        # generator.
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
