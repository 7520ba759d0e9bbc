"""The configuration of a Qwen2-VL or Qwen2.5-VL model, read from a Hugging Face ``config.json``.

Both layouts of that file are supported: the published one, with the language model's keys at the top level, and the one
that transformers 5 writes, with a nested ``text_config``.

transformers.AutoConfig is not used, although it reads the published files in the same way (a test compares the two). It
replaces missing keys by its own defaults (80 layers, a hidden size of 8192, a whole vision tower) and accepts a number
of heads that does not divide the hidden size, so every key would have to be checked in the JSON as well. Its import
takes seconds, and more memory than the conversion of a checkpoint needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_vcr1.config.layout import ModelShape
from megatron_vcr1.data.image_settings import ImageSettings, read_image_settings
from megatron_vcr1.errors import UserError
from megatron_vcr1.json_fields import Fields

_MAX_LAYERS = 4096

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

    @property
    def num_embeddings(self) -> int:
        """Number of rows of the embedding: token ids are below it."""
        return self.text.vocab_size

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
        settings = read_image_settings(folder)
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
    return (
        "name a directory that holds a Qwen2-VL or Qwen2.5-VL model; `hf download Qwen/Qwen2.5-VL-7B-Instruct "
        "--local-dir DIR` fetches one"
    )


def _model_config(raw: Fields) -> ModelConfig:
    family = next((name for name in get_args(Family) if name == raw.values.get("model_type")), None)
    if family is None:
        raise raw.error("model_type", "must be qwen2_vl or qwen2_5_vl, the supported types")
    if raw.values.get("quantization_config"):
        raise raw.error("quantization_config", "is not supported; take the unquantized checkpoint instead")
    nested = raw.section("text_config")
    # The keys of the language model are at the top level or in text_config, whose values take precedence.
    is_nested = "hidden_size" in nested or "num_hidden_layers" in nested
    present = {key: value for key, value in nested.values.items() if value is not None}
    merged = Fields({**raw.values, **present}, nested.where if is_nested else raw.where)
    # transformers 4.52 to 4.57 wrote this key, which concerns the whole model, to text_config only.
    tied = any([part.boolean("tie_word_embeddings") for part in (raw, nested)])
    text = _text_config(merged, tied=tied)
    if not raw.values.get("vision_config"):
        raise UserError(f"{raw.where}: vision_config is missing; only vision-language models are supported")
    vision = _vision_config(family, raw.section("vision_config"), text.hidden_size)
    config = ModelConfig(
        family=family,
        text=text,
        vision=vision,
        image_token_id=_pad_id(raw, "image_token_id", 151655, text.vocab_size),
        video_token_id=_pad_id(raw, "video_token_id", 151656, text.vocab_size),
    )
    try:
        _check(config)
    except UserError as error:
        raise UserError(f"{raw.where}: {error}") from None
    return config


def _pad_id(raw: Fields, key: str, default: int, vocab_size: int) -> int:
    """Return the id of a pad. The default, which is that of the published models, may lie beyond the vocabulary of a
    small model that has no pads.
    """
    token_id = raw.integer(key, default, minimum=0)
    if key in raw and token_id >= vocab_size:
        raise raw.error(key, f"must be below vocab_size, which is {vocab_size}: the embedding has no row for it")
    return token_id


def _text_config(raw: Fields, *, tied: bool) -> TextConfig:
    rope = raw.section("rope_parameters" if raw.values.get("rope_parameters") else "rope_scaling")
    for key in ("rope_type", "type"):
        if rope.text(key, None) not in (None, "default", "mrope"):
            raise rope.error(key, "is not supported; only 'mrope', the published models' rope type, is")
    if raw.boolean("use_sliding_window"):
        raise raw.error("use_sliding_window", "is not supported, and no published Qwen2-VL or Qwen2.5-VL model uses it")
    if raw.values.get("hidden_act", "silu") != "silu":
        raise raw.error("hidden_act", "must be 'silu'; no other value is supported")
    num_layers = raw.integer("num_hidden_layers", maximum=_MAX_LAYERS)
    _check_layer_types(raw, num_layers)
    num_heads = raw.integer("num_attention_heads")
    return TextConfig(
        num_layers=num_layers,
        hidden_size=raw.integer("hidden_size"),
        ffn_hidden_size=raw.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=raw.integer("num_key_value_heads", num_heads),
        vocab_size=raw.integer("vocab_size"),
        norm_epsilon=raw.number("rms_norm_eps", 1e-6, below=1),
        rope_theta=float((rope if "rope_theta" in rope else raw).number("rope_theta", 1e6)),
        mrope_section=_three(rope.integers("mrope_section", length=3)),
        tied_embeddings=tied,
    )


def _three(values: tuple[int, ...]) -> tuple[int, int, int]:
    first, second, third = values
    return first, second, third


def _check_layer_types(raw: Fields, num_layers: int) -> None:
    """Check the list of attention types that transformers 5 writes, one per layer; all of them must be full."""
    if "layer_types" not in raw:
        return
    types = raw.values["layer_types"]
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise raw.error("layer_types", "must be a list of strings, one per layer")
    if len(types) != num_layers:
        raise UserError(
            f"{raw.where}: layer_types has {len(types)} entries, but num_hidden_layers is {num_layers}; correct one of "
            "them, or remove layer_types"
        )
    if other := sorted(set(types) - {"full_attention"}):
        raise UserError(f"{raw.where}: layer_types contains {other[0]!r}; only 'full_attention' is supported")


def _vision_config(family: Family, raw: Fields, text_hidden_size: int) -> VisionConfig:
    # Published files omit keys that have the family's default values (depth 32, 16 heads, patches of 2 x 14 x 14).
    if family == "qwen2_5_vl":
        hidden_size = raw.integer("hidden_size")
        ffn_hidden_size = raw.integer("intermediate_size")
        out_hidden_size = raw.integer("out_hidden_size", text_hidden_size)
    else:  # in Qwen2-VL's file, "hidden_size" is the size of the merger's output
        hidden_size = raw.integer("embed_dim", 1280)
        ffn_hidden_size = int(hidden_size * raw.number("mlp_ratio", 4, below=1000))
        out_hidden_size = raw.integer("hidden_size", text_hidden_size)
    windowed = family == "qwen2_5_vl"
    for key, supported in (("in_channels", 3), ("in_chans", 3), ("hidden_act", "silu" if windowed else "quick_gelu")):
        if raw.values.get(key, supported) != supported:
            raise raw.error(key, f"must be {supported!r}; no other value is supported")
    full_attention: tuple[int, ...] = (7, 15, 23, 31)
    if "fullatt_block_indexes" in raw:
        full_attention = raw.integers("fullatt_block_indexes", below=_MAX_LAYERS)
    return VisionConfig(
        num_layers=raw.integer("depth", 32, maximum=_MAX_LAYERS),
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_heads=raw.integer("num_heads", 16),
        out_hidden_size=out_hidden_size,
        patch_size=raw.integer("patch_size", 14, maximum=1024),
        temporal_patch_size=raw.integer("temporal_patch_size", 2, maximum=64),
        merge_size=raw.integer("spatial_merge_size", 2, maximum=64),
        window_size=raw.integer("window_size", 112) if windowed else None,
        full_attention_layers=full_attention if windowed else (),
        tokens_per_second=raw.integer("tokens_per_second", 4) if windowed else None,
        gated=windowed,
    )


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
