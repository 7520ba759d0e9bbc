"""megatron-core's TransformerConfig for each tower, from the model's shape and the run's settings."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_vcr1.config.model_sections import ParallelSection, RecomputeSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import TextConfig, VisionConfig

Fp8Recipe = Literal["tensorwise", "blockwise"]
# Gradients have a wider range than E4M3 reaches with one scale a tensor; a scale a block is enough. Delayed scaling is
# left out: its history of maxima would have to be part of a checkpoint.
FP8_FORMATS = {"tensorwise": "hybrid", "blockwise": "e4m3"}
FP8_CAPABILITIES = {"tensorwise": (8, 9), "blockwise": (9, 0)}
FP8_FEATURE_MULTIPLE = 16  # of the features of an FP8 product: a GPU reads 16 bytes at a time
FP8_TOKEN_MULTIPLE = {"tensorwise": FP8_FEATURE_MULTIPLE, "blockwise": 128}
"""What a rank's rows are multiples of; sequence-parallel ranks hand on whole blocks only."""


def check_fp8(
    recipe: Fp8Recipe, text: TextConfig, parallel: ParallelSection, capability: tuple[int, int], cuda: str
) -> None:
    """Refuse FP8 where the GPU, CUDA or the model cannot do it.

    Args:
        capability: the GPU's compute capability.
        cuda: the version of CUDA that torch is built for.

    Raises:
        UserError: names what is missing.
    """
    if capability < (needed := FP8_CAPABILITIES[recipe]):
        raise UserError(
            f"model.fp8 = '{recipe}' needs a GPU of compute capability {needed[0]}.{needed[1]} or higher, this one has "
            f"{capability[0]}.{capability[1]}; unset it"
        )
    if recipe == "blockwise" and tuple(map(int, cuda.split("."))) < (12, 9):
        raise UserError(
            f"model.fp8 = 'blockwise' needs a torch for CUDA 12.9 or newer, this one is for {cuda}; use 'tensorwise'"
        )
    if parallel.sequence_parallel and text.hidden_size % FP8_TOKEN_MULTIPLE[recipe]:
        raise UserError(
            f"model.fp8 = '{recipe}' with parallel.sequence_parallel needs hidden features by multiples of "
            f"{FP8_TOKEN_MULTIPLE[recipe]}, these are {text.hidden_size}; unset one of the two"
        )
    tensor = parallel.tensor
    sizes = {
        "hidden": text.hidden_size,
        "FFN": text.ffn_hidden_size // tensor,
        "query": text.num_heads // tensor * text.head_dim,
        "key-value": max(text.num_kv_heads // tensor, 1) * text.head_dim,
    }
    if odd := [f"{size} {name}" for name, size in sizes.items() if size % FP8_FEATURE_MULTIPLE]:
        raise UserError(
            f"model.fp8: {' and '.join(odd)} features on a rank are no multiple of {FP8_FEATURE_MULTIPLE}; lower "
            "parallel.tensor, or unset it"
        )


def quick_gelu(x: Tensor) -> Tensor:
    """The sigmoid approximation of GELU that Qwen2-VL's vision tower was trained with (megatron-core's is compiled on
    first use).
    """
    return x * torch.sigmoid(1.702 * x)


def text_transformer_config(
    text: TextConfig,
    parallel: ParallelSection,
    recompute: RecomputeSection,
    *,
    dtype: torch.dtype,
    fp8: Fp8Recipe | None,
    initialize_weights: bool,
) -> TransformerConfig:
    """The language model, divided over pipeline stages."""
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
        add_qkv_bias=True,
        pipeline_model_parallel_size=parallel.pipeline,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        **({} if fp8 is None else {"fp8": FP8_FORMATS[fp8], "fp8_recipe": fp8}),
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
    """The vision tower, whole on the first pipeline stage, divided over the same tensor-parallel ranks."""
    return TransformerConfig(
        num_layers=vision.num_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.ffn_hidden_size,
        num_attention_heads=vision.num_heads,
        kv_channels=vision.head_dim,
        normalization="RMSNorm" if vision.gated else "LayerNorm",
        layernorm_epsilon=1e-6,
        gated_linear_unit=vision.gated,
        activation_func=F.silu if vision.gated else quick_gelu,
        add_bias_linear=True,
        add_qkv_bias=True,
        pipeline_model_parallel_size=1,
        **_common(parallel, recompute, dtype, initialize_weights),
        **_recompute(recompute, 1),  # num_layers divides the language model's stages, not necessarily this tower
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
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=initialize_weights,
        # Packed microbatches differ in length; megatron-core asks for this dispatcher with it, though there are no
        # experts.
        variable_seq_lengths=True,
        calculate_per_token_loss=True,  # gradients add up over microbatches and copies of the model: no means
        moe_token_dispatcher_type="alltoall",
        batch_p2p_comm=False,
        cuda_graph_scope=[],
        # Fusions that need Apex or a compiler are left to the TransformerEngine layers and to vcr1_kernels.
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
