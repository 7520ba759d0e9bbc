"""TransformerEngine's public modules in plain torch on the CPU: parameters, their names and attributes, and what a call
returns, as its documentation has them. For one rank. What else megatron-core needs of it to be imported is empty.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__version__ = "2.6.0"  # newer ones are asked for more


def _mark(parameter: Tensor, axis: int) -> None:
    parameter.tensor_model_parallel, parameter.partition_dim = True, axis  # type: ignore[attr-defined]


class Linear(nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool,
        init_method: Callable[[Tensor], object],
        bias: bool,
        return_bias: bool,
        params_dtype: torch.dtype,
        parallel_mode: str,
        device: str,
        tp_size: int,
        **ignored: Any,
    ) -> None:
        super().__init__()
        assert tp_size == 1 and parallel_mode in ("row", "column")
        self.in_features, self.out_features, self.use_bias, self.return_bias = (
            in_features,
            out_features,
            bias,
            return_bias,
        )
        self.sequence_parallel = sequence_parallel
        self.parallel_mode = parallel_mode
        self.weight = nn.Parameter(
            torch.full((out_features, in_features), torch.nan, device=device, dtype=params_dtype)
        )
        init_method(self.weight)
        _mark(self.weight, 1 if parallel_mode == "row" else 0)
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=params_dtype))
        else:
            self.bias = torch.empty(0)  # not a parameter

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        pass

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if self.return_bias:
            return F.linear(inp, self.weight), self.bias
        return F.linear(inp, self.weight, self.bias if self.use_bias else None)


def _normalized(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    if kind == "LayerNorm":
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class LayerNormLinear(Linear):
    def __init__(self, in_features: int, out_features: int, *, eps: float, normalization: str, **options: Any) -> None:
        assert not options.pop("return_layernorm_output") and not options.pop("zero_centered_gamma")
        super().__init__(in_features, out_features, **options)
        self.eps, self.normalization = eps, normalization
        like = dict(device=options["device"], dtype=options["params_dtype"])
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, **like))
        self.layer_norm_bias = nn.Parameter(torch.zeros(in_features, **like)) if normalization == "LayerNorm" else None

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Tensor | tuple[Tensor, Tensor]:
        return super().forward(
            _normalized(inp, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.normalization)
        )


class _Norm(nn.Module):
    kind: str

    def __init__(self, hidden_size: int, eps: float, params_dtype: torch.dtype, device: str, **ignored: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=params_dtype))
        self.bias = (
            nn.Parameter(torch.zeros(hidden_size, device=device, dtype=params_dtype))
            if self.kind == "LayerNorm"
            else None
        )

    def forward(self, inp: Tensor) -> Tensor:
        return _normalized(inp, self.weight, self.bias, self.eps, self.kind)


class LayerNorm(_Norm):
    kind = "LayerNorm"


class RMSNorm(_Norm):
    kind = "RMSNorm"


# What megatron-core asks for while it is imported; what it asks for in vain it does without.
_EMPTY_CLASSES = {
    "common": (),
    "common.recipe": ("DelayedScaling",),
    "pytorch": ("DotProductAttention", "GroupedLinear"),
    "pytorch.distributed": ("CudaRNGStatesTracker", "activation_recompute_forward"),
    "pytorch.fp8": ("FP8GlobalStateManager", "fp8_autocast"),
    "pytorch.tensor": ("QuantizedTensor",),
    "pytorch.ops": ("FusibleOperation", "Sequential"),
}
for _name, _classes in _EMPTY_CLASSES.items():
    _module = types.ModuleType(f"{__name__}.{_name}")
    for _class in _classes:
        setattr(_module, _class, type(_class, (), {}))
    sys.modules[_module.__name__] = _module
    _parent, _, _child = _module.__name__.rpartition(".")
    setattr(sys.modules[_parent], _child, _module)
for _class in (Linear, LayerNormLinear, LayerNorm, RMSNorm):
    setattr(sys.modules[f"{__name__}.pytorch"], _class.__name__, _class)
