"""A replacement for SGLang's compiled kernels, which are built for CUDA, in tests that run SGLang on the CPU.

SGLang's layers have a plain PyTorch path, which they use if SGLang's CPU kernels are not registered. They test for
`convert_weight_packed` among others, so it must not be declared here. But some modules look up kernels while they are
imported. Those names exist here, and raise an error when they are called.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import library

__version__ = "0.4.10"  # the version that sglang 0.5.23 requires

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
