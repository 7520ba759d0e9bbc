"""Sections [model], [parallel] and [recompute]: which model is trained, and how it is split across ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_vcr1.config.section import Names, Section


class ModelSection(Section):
    """The model to train, its precision, and the parts of it that stay frozen."""

    path: Path = Field(
        description="Directory of the initial model: a Hugging Face directory of a Qwen3-VL, Qwen2.5-VL or Qwen2-VL "
        "model, or an imported one.",
        examples=["models/Qwen2.5-VL-7B-Instruct"],
    )
    layer_spec: Literal["auto", "local", "transformer_engine"] = Field(
        default="auto",
        description="Implementation of the layers: 'transformer_engine', 'local' (plain PyTorch), or 'auto', which "
        "uses TransformerEngine if it is installed and a GPU is available. Attention always comes from vcr1_kernels. "
        "Change it only to compare the two, or to make a missing TransformerEngine an error.",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16",
        description="Data type of parameters and activations. With 'bfloat16' the optimizer keeps float32 master "
        "weights. Use 'float32' on CPUs and for exact comparisons.",
    )
    fp8: Literal["tensorwise", "blockwise", "mxfp8"] | None = Field(
        default=None,
        description="Run the matmuls of the language model's layers in FP8 during training, with TransformerEngine: "
        "'tensorwise' (per-tensor scaling; needs compute capability 8.9 or higher), 'blockwise' (one scale per block "
        "of 128 values; needs 9.0 or higher) or 'mxfp8' (one scale per 32 values; needs 10.0 to 11.x, Blackwell in "
        "data centers). Parameters, attention, head and vision tower stay in model.dtype, and so does the in-process "
        "engine. The FP8 copies of the weights take up to 2 more bytes per parameter. Unset: no FP8. Set it to save "
        "time, and watch mismatch/*.",
    )
    freeze: Names[Literal["vision_tower", "merger", "language_model"]] = Field(
        default=(),
        description="Parts of the model that are not trained: any of 'vision_tower', 'merger' and 'language_model'. If "
        "both 'vision_tower' and 'merger' are frozen, a GRPO step computes its vision features once, and keeps them "
        "for the passes of reference, old policy and updates. Empty: everything is trained. Freeze both to save memory "
        "and time, or if the data are few.",
    )

    @model_validator(mode="after")
    def _check_freeze(self) -> Self:
        if len(set(self.freeze)) == 3:
            raise ValueError("freeze names all three parts, so nothing would be trained; leave one out")
        return self

    @model_validator(mode="after")
    def _check_fp8(self) -> Self:
        if self.fp8 is not None and self.layer_spec == "local":
            raise ValueError(
                "fp8 needs TransformerEngine, but layer_spec is 'local'; unset fp8, or set layer_spec = 'auto'"
            )
        if self.fp8 is not None and self.dtype != "bfloat16":
            raise ValueError(f"fp8 needs dtype = 'bfloat16', not '{self.dtype}'; unset fp8, or change dtype")
        return self


class ParallelSection(Section):
    """How one replica of the model is split across ranks. The other ranks hold further replicas (data parallelism)."""

    tensor: int = Field(
        default=1,
        ge=1,
        description="Tensor-parallel size: number of ranks that each layer is sharded across. The vision tower follows "
        "parallel.vision. Raise it, up to the GPUs of a node, until the model fits.",
    )
    pipeline: int = Field(
        default=1,
        ge=1,
        description="Pipeline-parallel size: number of stages that the language model's layers are split into. The "
        "first stage also holds the vision tower. Raise it for models that do not fit on one node.",
    )
    context: int = Field(
        default=1,
        ge=1,
        description="Context-parallel size: number of ranks that the tokens of a group are split across, for prompts "
        "that are too long for one rank. The prompt is cut into parts, and every response stays whole on one rank. "
        "These ranks hold the same weights and shard the optimizer state, as data-parallel ranks do. Raise it for long "
        "videos.",
    )
    sequence_parallel: bool = Field(
        default=False,
        description="Sequence parallelism: shard the activations between tensor-parallel regions along the sequence. "
        "Saves memory; needs parallel.tensor > 1. Set it whenever parallel.tensor is above 1.",
    )
    vision: Literal["tensor", "data"] = Field(
        default="tensor",
        description="How the tensor-parallel ranks divide the vision tower: 'tensor' shards its layers like those of "
        "the language model; with 'data' every rank holds the whole tower and encodes a part of each microbatch's "
        "frames, without communication between its layers. 'data' is faster and takes more memory for weights, "
        "gradients and optimizer state. Without effect if parallel.tensor is 1. Use 'data' if that memory is there.",
    )
    first_stage_layers: int | None = Field(
        default=None,
        ge=1,
        description="Number of language-model layers on the first pipeline stage. Fewer layers there make up for the "
        "vision tower. Unset: an equal share.",
    )
    last_stage_layers: int | None = Field(
        default=None,
        ge=1,
        description="Number of language-model layers on the last pipeline stage, which also computes the head. Unset: "
        "an equal share. Lower it to balance the stages.",
    )

    @model_validator(mode="after")
    def _check_sequence_parallel(self) -> Self:
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError("sequence_parallel needs tensor > 1; raise tensor, or set sequence_parallel = false")
        return self

    @property
    def ranks_per_replica(self) -> int:
        """Number of ranks that compute a microbatch together."""
        return self.tensor * self.context * self.pipeline


class RecomputeSection(Section):
    """Which activations are recomputed in the backward pass instead of being stored. Trades compute for memory."""

    granularity: Literal["none", "selective", "full"] = Field(
        default="none",
        description="Extent of activation recomputation: 'none' stores all activations, 'selective' recomputes the "
        "parts of each layer that recompute.modules names, 'full' recomputes whole layers. Choose the least that fits "
        "in memory.",
    )
    num_layers: int = Field(
        default=1,
        ge=1,
        description="Number of language-model layers per recomputed block, with recompute.granularity = 'full': only "
        "the input of each block is stored. Must divide the number of layers of every pipeline stage. The vision tower "
        "always stores the input of every layer. Raise it to store fewer inputs; a larger block needs more memory "
        "while it is recomputed.",
    )
    offload: bool = Field(
        default=False,
        description="Keep what full recomputation stores, the inputs of the recomputed blocks, in host memory until "
        "the backward pass. Needs recompute.granularity = 'full'. On a GPU the copies overlap the computation; torch "
        "rounds each pinned buffer up to a power of two, so they take up to twice their size. Set it for very long "
        "prompts.",
    )
    modules: Names[Literal["core_attn", "mlp"]] = Field(
        default=("core_attn",),
        min_length=1,
        description="Parts of each layer to recompute, with recompute.granularity = 'selective': any of 'core_attn' "
        "(attention without its projections) and 'mlp'. Use 'mlp'; 'core_attn' saves little, because the attention "
        "kernels store no scores.",
    )

    @model_validator(mode="after")
    def _check_offload(self) -> Self:
        if self.offload and self.granularity != "full":
            raise ValueError(
                f"offload needs granularity = 'full', not '{self.granularity}': it moves the inputs of recomputed "
                "layers; set that, or offload = false"
            )
        return self
