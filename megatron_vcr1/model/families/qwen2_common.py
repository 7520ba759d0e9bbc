"""The common parts of Qwen2-VL and Qwen2.5-VL: the language model, the names of weights, the pixel statistics."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

from megatron_vcr1.data.media_rules import MediaRules
from megatron_vcr1.json_fields import Fields
from megatron_vcr1.model.config import ModelConfig, VisionConfig
from megatron_vcr1.model.families.base import Family
from megatron_vcr1.model.families.reading import (
    IMAGE_PAD_ID,
    VIDEO_PAD_ID,
    embeddings_are_tied,
    language_model_fields,
    pad_id,
    read_text_config,
    rope_base,
)
from megatron_vcr1.model.hf_layout import (
    TensorLayout,
    gate_on_up,
    language_model_layouts,
    norm_parts,
    patch_embed_layout,
    vision_attention_layouts,
    whole,
)

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


class Qwen2Family(Family):
    """The base of both families."""

    media = MediaRules()

    @abstractmethod
    def read_vision(self, raw: Fields, text_hidden_size: int) -> VisionConfig:
        """Read ``vision_config``.

        Args:
            raw: its keys.
            text_hidden_size: the language model's hidden size, the default of the merger's output size.
        """

    def read_config(self, raw: Fields) -> ModelConfig:
        tied = embeddings_are_tied(raw)
        fields = language_model_fields(raw)
        if fields.boolean("use_sliding_window"):
            raise fields.error("use_sliding_window", f"is not supported, and no published {self.title} model uses it")
        text = read_text_config(
            fields,
            head_dim=None,
            rope_theta=rope_base(fields, 1e6),
            mrope_axes=_consecutive_axes,
            qkv_bias=True,
            qk_norm=False,
            tied_embeddings=tied,
        )
        return ModelConfig(
            family=self,
            text=text,
            vision=self.read_vision(raw.section("vision_config"), text.hidden_size),
            image_token_id=pad_id(raw, "image_token_id", IMAGE_PAD_ID, text.vocab_size),
            video_token_id=pad_id(raw, "video_token_id", VIDEO_PAD_ID, text.vocab_size),
        )

    def tensor_layouts(self, config: ModelConfig) -> Iterator[TensorLayout]:
        vision = config.vision
        yield patch_embed_layout(vision, "visual.patch_embed.proj")
        for index in range(vision.num_layers):
            yield from _vision_layer(vision, f"vision_tower.decoder.layers.{index}", f"visual.blocks.{index}")
        yield from _merger(vision)
        yield from language_model_layouts(config.text, "model")


def _consecutive_axes(section: tuple[int, ...]) -> tuple[int, ...]:
    """Give the highest frequencies to time, the next to height and the lowest to width."""
    return tuple(axis for axis, number in enumerate(section) for _ in range(number))


def _vision_layer(vision: VisionConfig, key: str, hf_name: str) -> Iterator[TensorLayout]:
    hidden, ffn_hidden, padding = vision.hidden_size, vision.ffn_hidden_size, vision.ffn_padding
    yield from vision_attention_layouts(vision, f"{key}.self_attention", hf_name)
    for part in norm_parts(vision.normalization):
        yield whole(f"{key}.mlp.linear_fc1.layer_norm_{part}", f"{hf_name}.norm2.{part}", hidden)
    for part in ("weight", "bias"):
        columns = (hidden,) if part == "weight" else ()
        if vision.gated:
            yield gate_on_up(f"{key}.mlp.linear_fc1", f"{hf_name}.mlp", part, ffn_hidden, columns, padding)
        else:
            padded = (ffn_hidden + padding, *columns)
            name = f"{hf_name}.mlp.fc1.{part}"
            yield whole(f"{key}.mlp.linear_fc1.{part}", name, ffn_hidden, *columns, padded_shape=padded)
    down = f"{hf_name}.mlp.{'down_proj' if vision.gated else 'fc2'}"
    padded = (hidden, ffn_hidden + padding)
    yield whole(f"{key}.mlp.linear_fc2.weight", f"{down}.weight", hidden, ffn_hidden, padded_shape=padded)
    yield whole(f"{key}.mlp.linear_fc2.bias", f"{down}.bias", hidden)


def _merger(vision: VisionConfig) -> Iterator[TensorLayout]:
    merged = vision.hidden_size * vision.patches_per_token
    for part in norm_parts(vision.normalization):
        yield whole(f"vision_tower.merger.norm.{part}", f"visual.merger.ln_q.{part}", vision.hidden_size)
    for part in ("weight", "bias"):
        columns = (merged,) if part == "weight" else ()
        yield whole(f"vision_tower.merger.linear_fc1.{part}", f"visual.merger.mlp.0.{part}", merged, *columns)
        yield whole(
            f"vision_tower.merger.linear_fc2.{part}", f"visual.merger.mlp.2.{part}", vision.out_hidden_size, *columns
        )
