"""The one door to Triton: whether a tensor is computed by a Triton kernel or by PyTorch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
_interpreting = False


def use_triton(tensor: Tensor) -> bool:
    """True for GPU tensors where Triton is installed, and for CPU tensors inside `interpreter()`; never for float64."""
    if tensor.dtype not in _TRITON_DTYPES:
        return False
    return _interpreting or (tensor.is_cuda and _triton_is_installed())


@lru_cache(maxsize=1)
def _triton_is_installed() -> bool:
    installed = find_spec("triton") is not None
    if not installed:
        logging.getLogger(__name__).warning("vcr1_kernels: PyTorch on the GPU (triton is not installed)")
    return installed


@contextmanager
def interpreter() -> Iterator[None]:
    """Run the Triton kernels on CPU tensors in Triton's interpreter: slow, for proving them without a GPU.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 was not in the environment when triton was first imported.
    """
    import triton
    import triton.language as tl

    if not triton.knobs.runtime.interpret or isinstance(tl.sum, triton.JITFunction):
        raise RuntimeError("set TRITON_INTERPRET=1 before anything imports triton")
    _let_scalars_be_loop_bounds()
    global _interpreting
    previous, _interpreting = _interpreting, True
    try:
        yield
    finally:
        _interpreting = previous


@lru_cache(maxsize=1)
def _let_scalars_be_loop_bounds() -> None:
    """Triton 3.6's interpreter calls int() on one-element arrays, which numpy 2.4 refuses."""
    from triton.runtime import interpreter as triton_interpreter

    patch_tensor = triton_interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    triton_interpreter._patch_lang_tensor = patch_tensor_and_index
