"""A Qwen2.5-VL or Qwen3-VL with 0.4 million parameters in Hugging Face format.

It has random weights, a tokenizer and processor files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from megatron_vcr1.data.processor import VISION_TOKENS
from megatron_vcr1.data.scenes import COLOURS, CORNERS, SHAPES, VideoFormat

PATCH_SIZE = 8
TEMPORAL_PATCH_SIZE = 2
MERGE_SIZE = 2
FRAME_SIDE = PATCH_SIZE * MERGE_SIZE
"""Height and width, in pixels, of the frames that the model sees: one token for every two frames."""

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
"""Families of tiny models, by the "model_type" in config.json."""
HEAD_DIM = 32

END_OF_TURN = "<|im_end|>"
UNKNOWN = "<unk>"
SPECIAL_TOKENS = (UNKNOWN, "<|endoftext|>", "<|im_start|>", END_OF_TURN, *VISION_TOKENS)

HIDDEN = "-"
"""Timeline token of a half second in which the object is not visible; otherwise the token is the time."""

INITIALIZER_RANGE = 0.12
"""Larger than usual, for a narrow model: with 0.02 or 0.08 the loss stays on a plateau for hundreds of steps."""

PHRASES = (
    "user\n",
    "assistant\n",
    "\n",
    "<think>",
    "</think>\n<answer>",
    "<answer>",
    "</answer>",
    "</answer><glue>[(",
    ")]</glue>",
    "[",
    "]</answer>",
    ", ",
    " to ",
    "When is it true that the ",
    "Draw the time line, then say: when is it true that the ",
    " is visible?",
    "Follow the ",
    ".",
    "In which corner is the ",
    "?\n" + "\n".join(f"({letter}) {corner}" for letter, corner in zip("ABCD", CORNERS, strict=True)),
    "Where is the ",
    " at ",
    "?",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vocabulary(family: str = "qwen2_5_vl") -> tuple[str, ...]:
    """Return the text of every token; the index is the token id.

    Whole phrases are single tokens, as frequent byte pairs are in a large vocabulary. A time is one token, and so is
    each corner of a box, on a grid of tenths. This keeps the ratio of response tokens to vision tokens realistic. The
    time stamps of Qwen3-VL, such as `<1.2 seconds>`, are one token each, too.
    """
    video = VideoFormat()
    moments = [f"{index / video.fps:.1f}" for index in range(video.num_frames + 1)]
    tenths = [f"{index / 10:.1f}" for index in range(11)]
    upper_left = [f"[{x}, {y}, " for x in tenths for y in tenths]
    lower_right = [f"{x}, {y}]" for x in tenths for y in tenths]
    names = [*(f"{colour} " for colour in COLOURS), *SHAPES, *"ABCD", HIDDEN]
    # The time of a temporal patch is in the middle between its two frames.
    steps = range(0, video.num_frames, TEMPORAL_PATCH_SIZE) if family == "qwen3_vl" else ()
    stamps = [f"<{(step + 0.5) / video.fps:.1f} seconds>" for step in steps]
    return (*PHRASES, *names, *moments, *upper_left, *lower_right, *stamps, *SPECIAL_TOKENS)


def build_tokenizer(family: str = "qwen2_5_vl") -> PreTrainedTokenizerFast:
    """Build a tokenizer that matches the longest vocabulary entry, left to right; other text becomes `UNKNOWN`."""
    texts = vocabulary(family)
    words = Tokenizer(models.WordLevel({text: index for index, text in enumerate(texts)}, unk_token=UNKNOWN))
    longest_first = sorted(texts, key=len, reverse=True)
    pieces = Regex("|".join(re.escape(text) for text in longest_first))
    words.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        unk_token=UNKNOWN,
        eos_token=END_OF_TURN,
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", *VISION_TOKENS],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def model_config(
    *, hidden_size: int = 96, num_layers: int = 2, vision_hidden_size: int = 64, vision_layers: int = 1
) -> Qwen2_5_VLConfig:
    """Return a Qwen2.5-VL configuration with 32 features per head and attention windows of one merged token."""
    vision = _vision_config(hidden_size, vision_hidden_size, vision_layers)
    vision |= {"window_size": FRAME_SIDE, "fullatt_block_indexes": list(range(vision_layers)), "tokens_per_second": 2}
    return Qwen2_5_VLConfig(
        text_config=_text_config("qwen2_5_vl", hidden_size, num_layers),
        vision_config=vision,
        tie_word_embeddings=False,
        **_pad_ids("qwen2_5_vl"),
    )


def qwen3_vl_config(
    *, hidden_size: int = 96, num_layers: int = 2, vision_hidden_size: int = 64, vision_layers: int = 1
) -> Qwen3VLConfig:
    """Return a Qwen3-VL configuration of the same size; the features of its first vision layer are DeepStack's."""
    vision = _vision_config(hidden_size, vision_hidden_size, vision_layers)
    vision |= {"num_position_embeddings": (FRAME_SIDE // PATCH_SIZE) ** 2, "deepstack_visual_indexes": [0]}
    text = _text_config("qwen3_vl", hidden_size, num_layers) | {"head_dim": HEAD_DIM}
    text["rope_parameters"] |= {"mrope_interleaved": True}
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **_pad_ids("qwen3_vl"))


def _text_config(family: str, hidden_size: int, num_layers: int) -> dict[str, Any]:
    ids = {text: index for index, text in enumerate(vocabulary(family))}
    return dict(
        vocab_size=len(ids),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // HEAD_DIM,
        num_key_value_heads=hidden_size // HEAD_DIM,
        max_position_embeddings=512,
        # A small theta, because there are tens of positions instead of tens of thousands. A large temporal section,
        # because frames are single tokens: only their time tells them apart.
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [12, 2, 2]},
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=None,
        eos_token_id=ids[END_OF_TURN],
        pad_token_id=ids["<|endoftext|>"],
    )


def _vision_config(hidden_size: int, vision_hidden_size: int, vision_layers: int) -> dict[str, Any]:
    return dict(
        depth=vision_layers,
        hidden_size=vision_hidden_size,
        intermediate_size=2 * vision_hidden_size,
        num_heads=vision_hidden_size // HEAD_DIM,
        patch_size=PATCH_SIZE,
        temporal_patch_size=TEMPORAL_PATCH_SIZE,
        spatial_merge_size=MERGE_SIZE,
        out_hidden_size=hidden_size,
        initializer_range=INITIALIZER_RANGE,
    )


def _pad_ids(family: str) -> dict[str, int]:
    texts = vocabulary(family)
    names = {"video_token_id": "video_pad", "image_token_id": "image_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return {key: texts.index(f"<|{name}|>") for key, name in names.items()}


def write_model(folder: Path, seed: int, family: str = "qwen2_5_vl") -> None:
    """Write a complete Hugging Face directory with random weights.

    Args:
        folder: the directory.
        seed: seed of the weights.
        family: one of `FAMILIES`.
    """
    torch.manual_seed(seed)
    is_qwen3_vl = family == "qwen3_vl"
    if is_qwen3_vl:
        Qwen3VLForConditionalGeneration(qwen3_vl_config()).save_pretrained(folder)
    else:
        Qwen2_5_VLForConditionalGeneration(model_config()).save_pretrained(folder)
    build_tokenizer(family).save_pretrained(folder)
    settings = {
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "merge_size": MERGE_SIZE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": FRAME_SIDE**2, "longest_edge": FRAME_SIDE**2},
    }
    video_settings = settings | {
        "video_processor_type": "Qwen3VLVideoProcessor" if is_qwen3_vl else "Qwen2VLVideoProcessor"
    }
    if is_qwen3_vl:  # its bounds are on all frames of a video together
        video_settings["size"] = {
            "shortest_edge": FRAME_SIDE**2,
            "longest_edge": VideoFormat().num_frames * FRAME_SIDE**2,
        }
    processor = {
        "processor_class": "Qwen3VLProcessor" if is_qwen3_vl else "Qwen2_5_VLProcessor",
        "image_processor": settings | {"image_processor_type": "Qwen2VLImageProcessor"},
        "video_processor": video_settings,
    }
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
