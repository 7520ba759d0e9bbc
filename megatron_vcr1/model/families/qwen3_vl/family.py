"""Qwen3-VL: Qwen3 with interleaved mRoPE, DeepStack, and time stamps of video frames as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_vcr1.data.frame_rules import WholeVideoRules
from megatron_vcr1.data.media_rules import MediaRules
from megatron_vcr1.json_fields import Fields
from megatron_vcr1.model.config import ModelConfig, VisionConfig
from megatron_vcr1.model.families.base import Family, Grid
from megatron_vcr1.model.families.qwen3_vl.config import Qwen3VisionConfig, read_vision_config, segment_bounds
from megatron_vcr1.model.families.reading import (
    IMAGE_PAD_ID,
    VIDEO_PAD_ID,
    language_model_fields,
    pad_id,
    read_text_config,
    rope_base,
    rope_fields,
)
from megatron_vcr1.model.hf_layout import (
    TensorLayout,
    language_model_layouts,
    patch_embed_layout,
    vision_attention_layouts,
    whole,
)
from megatron_vcr1.model.mrope import vision_positions

if TYPE_CHECKING:
    from megatron.core.models.backends import BackendSpecProvider
    from megatron.core.transformer import TransformerConfig

    from megatron_vcr1.model.vision import VisionTower

_VISUAL = "model.visual"


@dataclass(frozen=True)
class Qwen3VL(Family):
    """Qwen3-VL in its dense sizes."""

    model_type = "qwen3_vl"
    title = "Qwen3-VL"
    media = MediaRules(
        timestamps_as_text=True,
        frames=WholeVideoRules(min_video_pixels=4096, max_video_pixels=24576 * 1024),
        video_patch_size=16,
    )

    def read_config(self, raw: Fields) -> ModelConfig:
        fields = language_model_fields(raw)
        rope = rope_fields(fields)
        if not rope.boolean("mrope_interleaved", True):
            raise rope.error("mrope_interleaved", "must be true, as in every published model of this family")
        if fields.boolean("attention_bias"):
            raise fields.error("attention_bias", "must be false, as in every published model of this family")
        text = read_text_config(
            fields,
            head_dim=fields.integer("head_dim", 128, maximum=4096),
            rope_theta=rope_base(fields),
            mrope_axes=interleaved_axes,
            qkv_bias=False,
            qk_norm=True,
            tied_embeddings=raw.boolean("tie_word_embeddings"),
        )
        return ModelConfig(
            family=self,
            text=text,
            vision=read_vision_config(raw.section("vision_config"), text.num_layers),
            image_token_id=pad_id(raw, "image_token_id", IMAGE_PAD_ID, text.vocab_size),
            video_token_id=pad_id(raw, "video_token_id", VIDEO_PAD_ID, text.vocab_size),
        )

    def tensor_layouts(self, config: ModelConfig) -> Iterator[TensorLayout]:
        vision = _checked(config.vision)
        hidden, side = vision.hidden_size, vision.positions_per_side
        yield patch_embed_layout(vision, f"{_VISUAL}.patch_embed.proj")
        yield whole("vision_tower.patch_embed.bias", f"{_VISUAL}.patch_embed.proj.bias", hidden)
        yield whole("vision_tower.position_embedding", f"{_VISUAL}.pos_embed.weight", side**2, hidden)
        for segment, (start, end) in enumerate(segment_bounds(vision)):
            for index in range(start, end):
                key = f"vision_tower.decoder.{segment}.layers.{index - start}"
                yield from _vision_layer(vision, key, f"{_VISUAL}.blocks.{index}")
        yield from _merger(vision, "vision_tower.merger", f"{_VISUAL}.merger", hidden)
        for index in range(len(vision.deepstack_layers)):
            key, name = f"vision_tower.deepstack_mergers.{index}", f"{_VISUAL}.deepstack_merger_list.{index}"
            yield from _merger(vision, key, name, hidden * vision.patches_per_token)
        yield from language_model_layouts(config.text, "model.language_model")

    def vision_blocks(self, vision: VisionConfig, grid: Grid, seconds_per_grid: float | None) -> list[Tensor]:
        # Each temporal patch of a video is a run of its own, at one position in time; the text before it says when.
        num_steps, height, width = grid
        block = vision_positions((1, height, width), None, merge_size=vision.merge_size, tokens_per_second=None)
        return [block] * num_steps

    def build_vision_tower(
        self, vision: VisionConfig, config: TransformerConfig, backend: BackendSpecProvider
    ) -> VisionTower:
        from megatron_vcr1.model.families.qwen3_vl.tower import DeepStackTower

        return DeepStackTower(_checked(vision), config, backend)

    def num_feature_layers(self, vision: VisionConfig) -> int:
        return len(_checked(vision).deepstack_layers)


def interleaved_axes(section: tuple[int, ...]) -> tuple[int, ...]:
    """Give every third frequency to height and every third to width, from the highest on, and the others to time.

    Raises:
        ValueError: there are not enough frequencies for that.
    """
    axes = [0] * sum(section)
    for axis in (1, 2):
        places = range(axis, 3 * section[axis], 3)
        if len(places) and places[-1] >= len(axes):
            raise ValueError(f"mrope_section {list(section)} gives over a third of the frequencies to height or width")
        for place in places:
            axes[place] = axis
    return tuple(axes)


def _checked(vision: VisionConfig) -> Qwen3VisionConfig:
    assert isinstance(vision, Qwen3VisionConfig)
    return vision


def _vision_layer(vision: VisionConfig, key: str, hf_name: str) -> Iterator[TensorLayout]:
    hidden, ffn_hidden, padded = vision.hidden_size, vision.ffn_hidden_size, vision.padded_ffn_hidden_size
    yield from vision_attention_layouts(vision, f"{key}.self_attention", hf_name)
    for part in ("weight", "bias"):
        yield whole(f"{key}.mlp.linear_fc1.layer_norm_{part}", f"{hf_name}.norm2.{part}", hidden)
    for name, shape, padded_shape in (
        ("linear_fc1.weight", (ffn_hidden, hidden), (padded, hidden)),
        ("linear_fc1.bias", (ffn_hidden,), (padded,)),
        ("linear_fc2.weight", (hidden, ffn_hidden), (hidden, padded)),
        ("linear_fc2.bias", (hidden,), (hidden,)),
    ):
        yield whole(f"{key}.mlp.{name}", f"{hf_name}.mlp.{name}", *shape, padded_shape=padded_shape)


def _merger(vision: VisionConfig, key: str, hf_name: str, norm_size: int) -> Iterator[TensorLayout]:
    merged = vision.hidden_size * vision.patches_per_token
    for part in ("weight", "bias"):
        yield whole(f"{key}.norm.{part}", f"{hf_name}.norm.{part}", norm_size)
    for name, rows in (("linear_fc1", merged), ("linear_fc2", vision.out_hidden_size)):
        yield whole(f"{key}.{name}.weight", f"{hf_name}.{name}.weight", rows, merged)
        yield whole(f"{key}.{name}.bias", f"{hf_name}.{name}.bias", rows)
