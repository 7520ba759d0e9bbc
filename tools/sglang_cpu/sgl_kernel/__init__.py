"""Stands in for SGLang's compiled kernels, which are built for CUDA, where a test runs SGLang on the CPU.

SGLang's layers have a plain PyTorch path. They take it where the CPU's own kernels are not registered
(`convert_weight_packed` among them, so it is not declared here). But some of its modules look kernels up while they are
imported: those names exist here, and fail when they are called.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import library

__version__ = "0.4.10"  # what sglang 0.5.23 asks for

_operators = library.Library("sgl_kernel", "FRAGMENT")
for _name in (
    "fused_qk_gemma_rmsnorm_cpu",
    "fused_qk_gemma_rmsnorm_with_gate_cpu",
    "fused_qkvzba_split_reshape_cat_contiguous_cpu",
    "fused_sigmoid_mul_cpu",
):
    _operators.define(f"{_name}(Tensor a) -> ()")


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} does not exist on the CPU")

    return missing
