"""The configuration of a model, read from a Hugging Face ``config.json``.

transformers.AutoConfig is not used, although it reads the published files in the same way (a test compares the two). It
replaces missing keys by its own defaults (80 layers, a hidden size of 8192, a whole vision tower) and accepts a number
of heads that does not divide the hidden size, so every key would have to be checked in the JSON as well. Its import
takes seconds, and more memory than the conversion of a checkpoint needs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_vcr1.config.layout import ModelShape
from megatron_vcr1.data.image_settings import ImageSettings, read_image_settings
from megatron_vcr1.data.media_rules import MediaRules
from megatron_vcr1.errors import UserError
from megatron_vcr1.json_fields import Fields
from megatron_vcr1.model.families.base import Family

Activation = Literal["silu", "quick_gelu", "gelu_tanh"]
VISION_ROTARY_BASE = 10_000.0  # of the vision towers' rotary positions, in every family


@dataclass(frozen=True, slots=True)
class Yarn:
    """YaRN (arXiv:2309.00071): rotary frequencies for longer sequences than a model was first trained with.

    Attributes:
        factor: by how much the range of positions grows.
        original_max_positions: the range of positions before that.
        beta_fast: frequencies with more rotations over the original range stay as they are.
        beta_slow: frequencies with fewer rotations over it are divided by the factor; in between, both are mixed.
    """

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float

    @property
    def attention_factor(self) -> float:
        """Factor of the RoPE tables."""
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """The experts of a mixture-of-experts model: small MLPs, of which a router chooses a few for each token."""

    num_experts: int
    num_per_token: int  # experts that a token is sent to
    ffn_hidden_size: int  # of one expert
    layers: frozenset[int]  # 0-based; the other layers have an ordinary MLP


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The language model: a decoder with RMSNorm, SwiGLU, grouped-query attention and mRoPE."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_epsilon: float
    rope_theta: float
    # The axis of each rotary frequency, from the highest on: 0 time, 1 height, 2 width. There are head_dim / 2.
    mrope_axes: tuple[int, ...]
    qkv_bias: bool
    qk_norm: bool  # whether an RMSNorm over each head precedes the rotary positions of queries and keys
    tied_embeddings: bool
    # Positions are below this in the model's training, or in the range that YaRN extends it to. None: not known.
    max_positions: int | None = None
    yarn: Yarn | None = None
    experts: ExpertsConfig | None = None  # None: every layer has an ordinary MLP

    def layer_experts(self, layer: int) -> ExpertsConfig | None:
        """Return the experts of a layer (0-based); None if it has an ordinary MLP."""
        return self.experts if self.experts is not None and layer in self.experts.layers else None


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The vision tower and its patch mergers; a family may add fields in a subclass."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int  # pixels
    temporal_patch_size: int  # frames
    merge_size: int  # merge_size x merge_size patches become one token
    normalization: Literal["RMSNorm", "LayerNorm"]
    activation: Activation
    gated: bool  # whether the MLP multiplies its activation with a second projection, as SwiGLU does
    # Mean and standard deviation of pixels in [0, 1], by channel; the processor's file may have other values.
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    in_channels: int = 3

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def ffn_padding(self) -> int:
        """Number of zero features that pad the inner ones of every MLP (`mlp_padding`). Published tensors have none."""
        return mlp_padding(self.ffn_hidden_size)

    @property
    def padded_ffn_hidden_size(self) -> int:
        return self.ffn_hidden_size + self.ffn_padding

    @property
    def patch_dim(self) -> int:
        """Number of values in a flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def patches_per_token(self) -> int:
        return self.merge_size**2


def mlp_padding(ffn_hidden_size: int) -> int:
    """Return the features to append to an MLP so that its shards are fast at tensor-parallel sizes 1, 2, 4 and 8.

    GPUs load 16 bytes at a time, 8 values of bfloat16, so rows of 855 values (3420 on 4 ranks) are slow in every matmul
    and activation. A size whose shards have whole groups of 8 values is left as it is. Others are padded to shards of a
    multiple of 64, unless that adds a tenth or more, as in tiny models. The padding has weights and biases of zero: it
    does not change the output, its gradients are zero, and so it stays zero.
    """
    if ffn_hidden_size % (8 * 8) == 0:
        return 0
    padding = -ffn_hidden_size % (8 * 64)
    return padding if 10 * padding < ffn_hidden_size else 0


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A vision-language model: its family, language model, vision tower and the ids of the pads."""

    family: Family
    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int

    @property
    def shape(self) -> ModelShape:
        """The sizes that config.layout.check_layout compares with a layout."""
        return ModelShape(
            num_layers=self.text.num_layers,
            num_heads=self.text.num_heads,
            num_kv_heads=self.text.num_kv_heads,
            ffn_hidden_size=self.text.ffn_hidden_size,
            vocab_size=self.text.vocab_size,
            vision_num_heads=self.vision.num_heads,
            vision_ffn_hidden_size=self.vision.padded_ffn_hidden_size,
            num_experts=0 if self.text.experts is None else self.text.experts.num_experts,
        )

    @property
    def num_embeddings(self) -> int:
        """Number of rows of the embedding: token ids are below it."""
        return self.text.vocab_size

    @property
    def pad_ids(self) -> frozenset[int]:
        """Ids of the pads, the tokens that vision features replace."""
        return frozenset((self.image_token_id, self.video_token_id))

    @property
    def media(self) -> MediaRules:
        """The rules of the family for images and videos."""
        return self.family.media

    @classmethod
    def from_pretrained(cls, model_dir: str | Path) -> ModelConfig:
        """Read ``config.json``, and the processor's pixel statistics, of a Hugging Face or imported directory.

        Raises:
            UserError: a file is missing, is not JSON, lacks a key, has a value of the wrong type or describes a model
                of another kind, or the processor's patch sizes are not the model's; the message names the file, the
                key and the value.
        """
        folder = Path(model_dir)
        path = folder / "config.json"
        if not path.exists():
            raise UserError(f"{path}: not found; {_advice_without_config(folder)}")
        config = _model_config(Fields.from_file(path))
        settings = read_image_settings(folder, video_patch_size=config.media.video_patch_size)
        if settings is None:
            return config
        _check_patch_sizes(config.vision, settings, path)
        if settings.mean is None or settings.std is None:
            return config
        return replace(config, vision=replace(config.vision, pixel_mean=settings.mean, pixel_std=settings.std))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Build the configuration from the decoded content of a ``config.json``.

        Raises:
            UserError: a key is missing or has a value that is not supported; the message names the key.
        """
        return _model_config(Fields(raw, "config.json"))


def _advice_without_config(model_dir: Path) -> str:
    """Return advice for a user who named a directory without a config.json."""
    if (model_dir / "checkpoints").is_dir():
        return f"{model_dir} is a run directory: name its export, or one of its checkpoints/step_N"
    if (model_dir / "adapter_config.json").exists():
        return f"{model_dir} holds a LoRA adapter: merge it into its base model, and name the directory of the result"
    if model_dir.name == "megatron" and (model_dir.parent / "config.json").exists():
        return f"name the directory that it is in, {model_dir.parent}"
    return (
        "name a directory that holds a model of a supported family; `hf download Qwen/Qwen2.5-VL-7B-Instruct "
        "--local-dir DIR` fetches one"
    )


def _model_config(raw: Fields) -> ModelConfig:
    from megatron_vcr1.model.families.registry import read_family  # the families import this module

    family = read_family(raw)
    if raw.values.get("quantization_config"):
        raise raw.error("quantization_config", "is not supported; take the unquantized checkpoint instead")
    if not raw.values.get("vision_config"):
        raise UserError(f"{raw.where}: vision_config is missing; only vision-language models are supported")
    config = family.read_config(raw)
    try:
        _check(config)
    except UserError as error:
        raise UserError(f"{raw.where}: {error}") from None
    return config


def _check_patch_sizes(vision: VisionConfig, settings: ImageSettings, config_path: Path) -> None:
    """Refuse a processor that cuts images into other patches than the vision tower takes."""
    for key, ours, theirs in (
        ("patch_size", "patch_size", "patch_size"),
        ("temporal_patch_size", "temporal_patch_size", "temporal_patch_size"),
        ("spatial_merge_size", "merge_size", "merge_size"),
    ):
        expected, found = getattr(vision, ours), getattr(settings, theirs)
        if found != expected:
            raise UserError(
                f"{settings.where}: {theirs} is {found}, but {config_path}: vision_config: {key} is {expected}; take "
                "both files from one model"
            )


def _check(config: ModelConfig) -> None:
    """Raise UserError if sizes do not fit together."""
    text, vision = config.text, config.vision
    if text.num_heads % text.num_kv_heads:
        raise UserError(f"{text.num_heads} heads are not a multiple of {text.num_kv_heads} key-value heads")
    if vision.hidden_size % vision.num_heads:
        raise UserError(
            f"vision_config: hidden size {vision.hidden_size} is not a multiple of {vision.num_heads} heads"
        )
    if vision.head_dim % 4:
        raise UserError(
            f"vision_config: head dimension {vision.head_dim} must be a multiple of 4 for two-axis rotary positions"
        )
    if vision.out_hidden_size != text.hidden_size:
        raise UserError(
            f"the merger's output has {vision.out_hidden_size} features, but the language model's hidden size is "
            f"{text.hidden_size}"
        )
