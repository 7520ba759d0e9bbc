"""A stand-in for TransformerEngine on the CPU, in plain torch and for one rank.

It has the modules of which megatron-core builds layers, with the arguments, parameter names and attributes, return
values and handling of gradient buffers of TransformerEngine 2.9 to 2.20. Everything else that megatron-core imports is
empty.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

__version__ = "2.20.2"


def _mark(parameter: Tensor, axis: int) -> None:
    parameter.tensor_model_parallel, parameter.partition_dim = True, axis  # type: ignore[attr-defined]


class _LinearFunction(torch.autograd.Function):
    """Computes x @ weight.T + bias.

    If there is a gradient buffer, backward adds the weight's gradient to it, or overwrites it if `writes` is True.
    Autograd then receives NaN or None as the weight's gradient, so that a test fails if anything reads it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor | None, writes: bool | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.buffer, ctx.writes, ctx.has_bias = buffer, writes, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_tokens = grad.flatten(0, -2)
        grad_weight: Tensor | None = grad_tokens.t() @ x.flatten(0, -2)
        if ctx.buffer is not None:
            (ctx.buffer.copy_ if ctx.writes else ctx.buffer.add_)(grad_weight)
            grad_weight = None
            if hasattr(weight, "grad_added_to_main_grad"):
                weight.grad_added_to_main_grad = True
                grad_weight = torch.full_like(weight, torch.nan)
        return grad @ weight, grad_weight, grad_tokens.sum(0) if ctx.has_bias else None, None, None


class Linear(nn.Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: dist.ProcessGroup | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], object] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], object] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: None = None,
        device: torch.device | str = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert tp_size == 1 and parallel_mode in ("row", "column") and init_method is not None
        overlaps = ub_overlap_ag or ub_overlap_rs or ub_overlap_rs_dgrad or ub_bulk_dgrad or ub_bulk_wgrad
        assert not overlaps and not delay_wgrad_compute and symmetric_ar_type is None  # not implemented here
        self.save_original_input, self.name = save_original_input, name
        self.in_features, self.out_features, self.use_bias, self.return_bias = (
            in_features,
            out_features,
            bias,
            return_bias,
        )
        self.sequence_parallel = sequence_parallel
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
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

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool = False,
        fp8_grad: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        buffer = self.weight.main_grad if self.fuse_wgrad_accumulation and self.weight.requires_grad else None
        bias = self.bias if self.use_bias and not self.return_bias else None
        output: Tensor = _LinearFunction.apply(inp, self.weight, bias, buffer, is_first_microbatch)
        return (output, self.bias) if self.return_bias else output


def _normalize(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    assert x.numel(), "TransformerEngine's norms would launch a kernel without thread blocks"
    if kind == "LayerNorm":
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        *,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        **options: Any,
    ) -> None:
        assert not return_layernorm_output and not zero_centered_gamma
        assert not {"rng_tracker_name", "save_original_input"} & options.keys()  # Linear's only
        super().__init__(in_features, out_features, **options)
        self.eps, self.normalization = eps, normalization
        like = dict(device=options["device"], dtype=options["params_dtype"])
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, **like))
        self.layer_norm_bias = nn.Parameter(torch.zeros(in_features, **like)) if normalization == "LayerNorm" else None

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool = False,
        fp8_grad: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        normalized = _normalize(inp, self.layer_norm_weight, self.layer_norm_bias, self.eps, self.normalization)
        return super().forward(normalized, is_first_microbatch, fp8_output, fp8_grad)


class _Norm(nn.Module):
    kind: str

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        size = hidden_size if normalized_shape is None else normalized_shape  # megatron-core 0.16 uses the old name
        assert size is not None and not zero_centered_gamma
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size, device=device, dtype=params_dtype))
        self.bias = (
            nn.Parameter(torch.zeros(size, device=device, dtype=params_dtype)) if self.kind == "LayerNorm" else None
        )

    def forward(self, inp: Tensor) -> Tensor:
        return _normalize(inp, self.weight, self.bias, self.eps, self.kind)


class LayerNorm(_Norm):
    kind = "LayerNorm"


class RMSNorm(_Norm):
    kind = "RMSNorm"


# Names that megatron-core imports. It works without the optional ones that are missing here.
_EMPTY_CLASSES = {
    "common": (),
    "common.recipe": ("DelayedScaling",),
    "pytorch": ("DotProductAttention", "GroupedLinear"),
    "pytorch.distributed": ("CudaRNGStatesTracker", "activation_recompute_forward"),
    "pytorch.fp8": ("FP8GlobalStateManager", "fp8_autocast", "fp8_model_init"),
    "pytorch.router": (
        "fused_compute_score_for_moe_aux_loss",
        "fused_moe_aux_loss",
        "fused_topk_with_score_function",
    ),
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
