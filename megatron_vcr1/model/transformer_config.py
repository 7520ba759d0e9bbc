"""megatron-core's TransformerConfig of each tower, from the model's configuration and the run's settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_vcr1.config.model_sections import ParallelSection, RecomputeSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import Activation, TextConfig, VisionConfig
from megatron_vcr1.parallel.megatron_compat import no_cuda_graphs

Fp8Recipe = Literal["tensorwise", "blockwise", "mxfp8"]


@dataclass(frozen=True, slots=True)
class Fp8Requirements:
    """Requirements of an FP8 recipe of TransformerEngine.

    Attributes:
        number_format: megatron-core's name of the 8-bit formats.
        min_capability: lowest compute capability of the GPU.
        end_capability: the first compute capability without it; None if there is none.
        min_cuda: lowest CUDA version that torch is built for.
        feature_multiple: each rank's feature dimensions of a GEMM must be multiples of this.
        token_multiple: each rank's number of tokens must be a multiple of this.
    """

    number_format: Literal["hybrid", "e4m3"]
    min_capability: tuple[int, int]
    end_capability: tuple[int, int] | None
    min_cuda: tuple[int, int]
    feature_multiple: int
    token_multiple: int

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Return whether GPUs of this compute capability support the recipe."""
        return capability >= self.min_capability and (self.end_capability is None or capability < self.end_capability)


# Delayed scaling is not offered: its history of maxima would have to be saved in checkpoints.
FP8_RECIPES: dict[Fp8Recipe, Fp8Requirements] = {
    # One scale per tensor, from its current maximum. Gradients need the range of E5M2 ("hybrid": E4M3 forward, E5M2
    # backward). The GPU loads 16 bytes at a time.
    "tensorwise": Fp8Requirements("hybrid", (8, 9), None, (12, 1), feature_multiple=16, token_multiple=16),
    # One scale per block of 128 values. Sequence-parallel ranks exchange whole blocks.
    "blockwise": Fp8Requirements("e4m3", (9, 0), None, (12, 9), feature_multiple=16, token_multiple=128),
    # One power of two per 32 values, which Blackwell's tensor cores apply themselves. TransformerEngine does not
    # support all of its GEMMs on compute capability 12.0.
    "mxfp8": Fp8Requirements("e4m3", (10, 0), (12, 0), (12, 8), feature_multiple=32, token_multiple=32),
}


def check_fp8(
    recipe: Fp8Recipe, text: TextConfig, parallel: ParallelSection, capability: tuple[int, int], cuda: str
) -> None:
    """Check that the GPU, CUDA and the model support an FP8 recipe.

    Args:
        recipe: model.fp8.
        text: the language model, whose layers use FP8.
        parallel: the layout.
        capability: compute capability of the GPU.
        cuda: the CUDA version that torch is built for, such as "12.9".

    Raises:
        UserError: FP8 is not supported; the message says what is missing.
    """
    needed = FP8_RECIPES[recipe]
    if text.experts is not None:
        raise UserError(f"model.fp8 = '{recipe}' is not supported for a model with experts; unset it")
    if not needed.runs_on(capability):
        end = f", and lower than {_dotted(needed.end_capability)}" if needed.end_capability else ""
        others = " or ".join(repr(name) for name, other in FP8_RECIPES.items() if other.runs_on(capability))
        raise UserError(
            f"model.fp8 = '{recipe}' needs a GPU of compute capability {_dotted(needed.min_capability)} or higher{end};"
            f" this one has {_dotted(capability)}: {f'choose {others}, or ' if others else ''}unset it"
        )
    if tuple(map(int, cuda.split("."))) < needed.min_cuda:
        raise UserError(
            f"model.fp8 = '{recipe}' needs a torch for CUDA {_dotted(needed.min_cuda)} or newer, this one is for "
            f"{cuda}; install another torch, or choose another recipe"
        )
    if parallel.sequence_parallel and text.hidden_size % needed.token_multiple:
        raise UserError(
            f"model.fp8 = '{recipe}' with parallel.sequence_parallel needs a hidden size that is a multiple of "
            f"{needed.token_multiple}, and the model's is {text.hidden_size}; unset one of the two"
        )
    tensor = parallel.tensor
    sizes = {
        "hidden": text.hidden_size,
        "FFN": text.ffn_hidden_size // tensor,
        "query": text.num_heads // tensor * text.head_dim,
        "key-value": max(text.num_kv_heads // tensor, 1) * text.head_dim,
    }
    if odd := [f"{size} {name}" for name, size in sizes.items() if size % needed.feature_multiple]:
        raise UserError(
            f"model.fp8 = '{recipe}': {' and '.join(odd)} features per rank are not a multiple of "
            f"{needed.feature_multiple}; lower parallel.tensor, or unset model.fp8"
        )


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def quick_gelu(x: Tensor) -> Tensor:
    """Compute the sigmoid approximation of GELU.

    megatron-core has the same function, but compiles it on first use.
    """
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "quick_gelu": quick_gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def text_transformer_config(
    text: TextConfig,
    parallel: ParallelSection,
    recompute: RecomputeSection,
    *,
    dtype: torch.dtype,
    fp8: Fp8Recipe | None,
    initialize_weights: bool,
) -> TransformerConfig:
    """Build the configuration of the language model, whose layers are split into pipeline stages."""
    return TransformerConfig(
        num_layers=text.num_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.ffn_hidden_size,
        num_attention_heads=text.num_heads,
        num_query_groups=text.num_kv_heads,
        kv_channels=text.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=text.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=text.qkv_bias,
        qk_layernorm=text.qk_norm,  # megatron-core sums the norms' gradients over the tensor-parallel ranks
        pipeline_model_parallel_size=parallel.pipeline,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        **({} if fp8 is None else {"fp8": FP8_RECIPES[fp8].number_format, "fp8_recipe": fp8}),
        **_common(parallel, recompute, dtype, initialize_weights),
        **_recompute(recompute, recompute.num_layers),
    )


def vision_transformer_config(
    vision: VisionConfig,
    parallel: ParallelSection,
    recompute: RecomputeSection,
    *,
    dtype: torch.dtype,
    initialize_weights: bool,
) -> TransformerConfig:
    """Build the configuration of the vision tower.

    All of its layers are on the first pipeline stage, sharded across the same tensor-parallel ranks as the language
    model, or, with `parallel.vision = "data"`, whole on each of these ranks.
    """
    if parallel.vision == "data":
        parallel = parallel.model_copy(update={"tensor": 1, "sequence_parallel": False})
    return TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.padded_ffn_hidden_size,
        num_attention_heads=vision.num_heads,
        kv_channels=vision.head_dim,
        normalization=vision.normalization,
        layernorm_epsilon=1e-6,
        gated_linear_unit=vision.gated,
        activation_func=_ACTIVATIONS[vision.activation],
        add_bias_linear=True,
        add_qkv_bias=True,
        pipeline_model_parallel_size=1,
        **_common(parallel, recompute, dtype, initialize_weights),
        # Layer by layer: recompute.num_layers is checked against the language model's stages, not against this tower.
        **_recompute(recompute, 1),
    )


def _common(
    parallel: ParallelSection, recompute: RecomputeSection, dtype: torch.dtype, initialize_weights: bool
) -> dict[str, Any]:
    return dict(
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        deterministic_mode=torch.are_deterministic_algorithms_enabled(),  # the embedding's gradient without atomics
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=initialize_weights,
        variable_seq_lengths=True,  # packed microbatches differ in length
        moe_token_dispatcher_type="alltoall",  # required with variable_seq_lengths; not used
        calculate_per_token_loss=True,  # sum gradients over microbatches and replicas, without averaging
        batch_p2p_comm=False,
        **no_cuda_graphs(),
        # These fusions need Apex or a compiler. TransformerEngine's layers and vcr1_kernels have their own.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )


def _recompute(recompute: RecomputeSection, num_layers: int) -> dict[str, Any]:
    if recompute.granularity == "none":
        return {}
    if recompute.granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(recompute.modules)}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": num_layers}
