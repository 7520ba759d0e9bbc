"""The configuration of a Qwen2-VL or Qwen2.5-VL model, read from a Hugging Face ``config.json``.

Both layouts of that file are supported: the published one, with the language model's keys at the top level, and the one
that transformers 5 writes, with a nested ``text_config``.

transformers.AutoConfig is not used, although it reads the published files in the same way (a test compares the two). It
replaces missing keys by its own defaults (80 layers, a hidden size of 8192, a whole vision tower) and accepts a number
of heads that does not divide the hidden size, so every key would have to be checked in the JSON as well. Its import
takes seconds, and more memory than the conversion of a checkpoint needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_vcr1.config.layout import ModelShape
from megatron_vcr1.errors import UserError

Family = Literal["qwen2_vl", "qwen2_5_vl"]


@dataclass(frozen=True, slots=True)
class TextConfig:
    """The language model: Qwen2 with mRoPE."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    norm_epsilon: float
    rope_theta: float
    mrope_section: tuple[int, int, int]  # frequencies of time, height and width; they sum to head_dim / 2
    tied_embeddings: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True, slots=True)
class VisionConfig:
    """The vision tower and its patch merger."""

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    out_hidden_size: int
    patch_size: int  # pixels
    temporal_patch_size: int  # frames
    merge_size: int  # merge_size x merge_size patches become one token
    window_size: int | None  # side of an attention window, in pixels; None: full attention in every layer
    full_attention_layers: tuple[int, ...]  # 0-based; the other layers attend within windows
    tokens_per_second: int | None  # time positions per second; None: one per temporal patch, whatever its duration
    gated: bool  # True: SwiGLU and RMSNorm (Qwen2.5-VL); False: QuickGELU and LayerNorm (Qwen2-VL)
    in_channels: int = 3
    # Mean and standard deviation of pixels in [0, 1], by channel; the processor's file may have other values.
    pixel_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Number of values in a flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def patches_per_token(self) -> int:
        return self.merge_size**2


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A vision-language model: language model, vision tower and the ids of the pads."""

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
            vision_ffn_hidden_size=self.vision.ffn_hidden_size,
        )

    @classmethod
    def from_pretrained(cls, model_dir: str | Path) -> ModelConfig:
        """Read ``config.json``, and the processor's pixel statistics, of a Hugging Face or imported directory.

        Raises:
            UserError: the file is missing, is not JSON, lacks a key, or describes a model of another kind; the message
                names the file and the key.
        """
        path = Path(model_dir) / "config.json"
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(f"{path}: not found; {_advice_without_config(path.parent)}") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as JSON: {error}") from error
        try:
            config = cls.from_dict(raw)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        mean, std = _pixel_statistics(Path(model_dir)) or (config.vision.pixel_mean, config.vision.pixel_std)
        return replace(config, vision=replace(config.vision, pixel_mean=mean, pixel_std=std))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Build the configuration from the parsed JSON object.

        Raises:
            UserError: a key is missing or has a value that is not supported; the message names the key.
        """
        family = raw.get("model_type")
        if family not in ("qwen2_vl", "qwen2_5_vl"):
            raise UserError(f"model_type is {family!r}; the supported types are qwen2_vl and qwen2_5_vl")
        if raw.get("quantization_config"):
            raise UserError("quantization_config is set; convert the unquantized checkpoint instead")
        text_raw = {**raw, **raw.get("text_config", {})}
        if not raw.get("vision_config"):
            raise UserError("vision_config is missing")
        # transformers 4.52 to 4.57 wrote this key, which concerns the whole model, to text_config only.
        tied = any(part.get("tie_word_embeddings") for part in (raw, raw.get("text_config", {})))
        text = _text_config(text_raw, tied=tied)
        vision = _vision_config(family, raw["vision_config"], text.hidden_size)
        config = cls(
            family=family,
            text=text,
            vision=vision,
            image_token_id=int(raw.get("image_token_id", 151655)),
            video_token_id=int(raw.get("video_token_id", 151656)),
        )
        _check(config)
        return config


def _advice_without_config(model_dir: Path) -> str:
    """Return advice for a user who named a directory without a config.json."""
    if (model_dir / "checkpoints").is_dir():
        return f"{model_dir} is a run directory: name its export, or one of its checkpoints/step_N"
    return (
        "name a directory that holds a Qwen2-VL or Qwen2.5-VL model; `hf download Qwen/Qwen2.5-VL-7B-Instruct "
        "--local-dir DIR` fetches one"
    )


def _require(raw: Mapping[str, Any], key: str, where: str) -> Any:
    """Return the value of a key that has no default."""
    if raw.get(key) is None:
        raise UserError(f"{where} lacks {key!r}")
    return raw[key]


def _text_config(raw: Mapping[str, Any], *, tied: bool) -> TextConfig:
    where = "the language model's configuration"
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if (kind := rope.get("rope_type") or rope.get("type")) not in (None, "default", "mrope"):
        raise UserError(f"rope type {kind!r} is set; only 'mrope', the published models' type, is supported")
    if raw.get("use_sliding_window"):
        raise UserError(
            "use_sliding_window is true; it is not supported, and no published Qwen2-VL or Qwen2.5-VL model uses it"
        )
    return TextConfig(
        num_layers=_require(raw, "num_hidden_layers", where),
        hidden_size=_require(raw, "hidden_size", where),
        ffn_hidden_size=_require(raw, "intermediate_size", where),
        num_heads=_require(raw, "num_attention_heads", where),
        num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        vocab_size=_require(raw, "vocab_size", where),
        norm_epsilon=raw.get("rms_norm_eps", 1e-6),
        rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 1e6),
        mrope_section=tuple(_require(rope, "mrope_section", f"{where} (rope_scaling or rope_parameters)")),
        tied_embeddings=tied,
    )


def _vision_config(family: Family, raw: Mapping[str, Any], text_hidden_size: int) -> VisionConfig:
    # Published files omit keys that have the family's default values (depth 32, 16 heads, patches of 2 x 14 x 14).
    if family == "qwen2_5_vl":
        hidden_size = _require(raw, "hidden_size", "vision_config")
        ffn_hidden_size = _require(raw, "intermediate_size", "vision_config")
        out_hidden_size = raw.get("out_hidden_size", text_hidden_size)
    else:  # in Qwen2-VL's file, "hidden_size" is the size of the merger's output
        hidden_size = raw.get("embed_dim", 1280)
        ffn_hidden_size = int(hidden_size * raw.get("mlp_ratio", 4))
        out_hidden_size = raw.get("hidden_size", text_hidden_size)
    windowed = family == "qwen2_5_vl"
    num_layers = raw.get("depth", 32)
    return VisionConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_heads=raw.get("num_heads", 16),
        out_hidden_size=out_hidden_size,
        patch_size=raw.get("patch_size", 14),
        temporal_patch_size=raw.get("temporal_patch_size", 2),
        merge_size=raw.get("spatial_merge_size", 2),
        window_size=raw.get("window_size", 112) if windowed else None,
        full_attention_layers=tuple(raw.get("fullatt_block_indexes", (7, 15, 23, 31))) if windowed else (),
        tokens_per_second=raw.get("tokens_per_second", 4) if windowed else None,
        gated=windowed,
        in_channels=raw.get("in_channels", 3),
    )


def _pixel_statistics(model_dir: Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the mean and standard deviation of pixels from the processor's file; None if it has none.

    transformers 5 nests them in processor_config.json; earlier versions wrote preprocessor_config.json.
    """
    for name, read in (
        ("processor_config.json", lambda raw: raw.get("image_processor", {})),
        ("preprocessor_config.json", lambda raw: raw),
    ):
        path = model_dir / name
        if path.is_file():
            try:
                settings = read(json.loads(path.read_text()))
            except ValueError as error:
                raise UserError(f"{path}: cannot be read as JSON: {error}") from None
            if "image_mean" in settings and "image_std" in settings:
                return tuple(settings["image_mean"]), tuple(settings["image_std"])
    return None


def _check(config: ModelConfig) -> None:
    """Raise UserError if sizes do not fit together."""
    text, vision = config.text, config.vision
    for name, part in (("the language model", text), ("vision_config", vision)):
        if part.hidden_size % part.num_heads:
            raise UserError(f"{name}: hidden size {part.hidden_size} is not a multiple of {part.num_heads} heads")
    if text.num_heads % text.num_kv_heads:
        raise UserError(f"{text.num_heads} heads are not a multiple of {text.num_kv_heads} key-value heads")
    if 2 * sum(text.mrope_section) != text.head_dim:
        raise UserError(
            f"mrope_section {list(text.mrope_section)} must sum to half the head dimension, {text.head_dim // 2}"
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
    if vision.window_size is not None and vision.window_size < vision.merge_size * vision.patch_size:
        raise UserError(f"vision_config: window_size {vision.window_size} is smaller than one merged token")
