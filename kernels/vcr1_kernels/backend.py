"""The choice between a Triton kernel and the PyTorch path, launches on any GPU, and Triton's interpreter.

The modules in `triton_ops` import triton at their top, and triton may be missing. The ops therefore import them inside
the functions that launch a kernel, after `use_triton` has returned True.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, wraps
from importlib.util import find_spec
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
_interpreting = False  # True inside `interpreter()`


def use_triton(tensor: Tensor) -> bool:
    """Return whether an op on `tensor` runs a Triton kernel.

    True for GPU tensors if triton is installed, and for CPU tensors inside `interpreter()`. Never for float64, which
    the kernels would compute in float32.
    """
    if tensor.dtype not in _TRITON_DTYPES:
        return False
    return _interpreting or (tensor.is_cuda and _triton_is_installed())


@lru_cache(maxsize=1)  # cached, so that the warning is logged once
def _triton_is_installed() -> bool:
    installed = find_spec("triton") is not None
    if not installed:
        logging.getLogger(__name__).warning(
            "triton is not installed: vcr1_kernels runs its slower PyTorch code on the GPU"
        )
    return installed


def on_its_gpu(launch: Callable[Concatenate[Tensor, _P], _R]) -> Callable[Concatenate[Tensor, _P], _R]:
    """Decorate a launch so that the GPU of its first argument is the current one: Triton launches kernels there."""

    @wraps(launch)
    def launch_on_its_gpu(tensor: Tensor, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not tensor.is_cuda:
            return launch(tensor, *args, **kwargs)
        with torch.cuda.device(tensor.device):
            return launch(tensor, *args, **kwargs)

    return launch_on_its_gpu


def int32_tensor(values: Sequence[Any], device: torch.device) -> Tensor:
    """Copy a list to a device; to a GPU from pinned memory, so that the host does not wait for earlier work."""
    is_cuda = device.type == "cuda"
    return torch.tensor(values, dtype=torch.int32, pin_memory=is_cuda).to(device, non_blocking=is_cuda)


@contextmanager
def interpreter() -> Iterator[None]:
    """Run the Triton kernels on CPU tensors in Triton's interpreter: slow, for testing them without a GPU.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 was not in the environment when triton was first imported.
    """
    import triton
    import triton.language as tl

    # `triton.jit` reads the variable when a function is decorated. If it was set too late, triton's own library
    # functions such as `tl.sum` are already compiled functions, which the interpreter cannot call.
    if not triton.knobs.runtime.interpret or isinstance(tl.sum, triton.JITFunction):
        raise RuntimeError("set TRITON_INTERPRET=1 in the environment before anything imports triton")
    _patch_interpreter_loop_bounds()
    global _interpreting
    previous, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = previous


@lru_cache(maxsize=1)  # cached, so that the patch is applied once
def _patch_interpreter_loop_bounds() -> None:
    """Patch the interpreter so that scalars that a kernel has loaded can be bounds of `range`.

    Triton 3.6's interpreter converts them by calling int() on arrays with one element, which numpy 2.4 refuses.
    """
    from triton.runtime import interpreter as triton_interpreter

    patch_tensor = triton_interpreter._patch_lang_tensor

    def patch_tensor_with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    triton_interpreter._patch_lang_tensor = patch_tensor_with_index
