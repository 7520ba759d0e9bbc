"""Directories of Hugging Face models without weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_vcr1.data.media_rules import MediaRules
from megatron_vcr1.data.processor import VISION_TOKENS
from megatron_vcr1.model.families.registry import FAMILIES

# Like the published template: one pad for each image or video, and a default system turn if there is none.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nHelp.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IMAGE_SETTINGS = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 3136, "max_pixels": 50176}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


MEDIA = MediaRules()
STAMPED_MEDIA = FAMILIES["qwen3_vl"].media


@dataclass(frozen=True)
class _Facts:
    num_embeddings: int = 264
    image_token_id: int = 260
    video_token_id: int = 261
    media: MediaRules = MEDIA


QWEN_7B_TOKENS = _Facts(152064, 151655, 151656)
TOKENS = _Facts()
"""The token ids of `write_model_dir`; its tokenizer has 256 bytes and 6 special tokens."""

PROCESSORS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}
PROCESSORS |= {"qwen3_vl": "Qwen3VLProcessor", "qwen3_vl_moe": "Qwen3VLProcessor"}
QWEN3_VL_SETTINGS: dict[str, Any] = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
QWEN3_VL_SETTINGS |= {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
"""The settings of Qwen3-VL's processor that images and videos share."""


def write_model_dir(folder: Path, family: str = "qwen2_5_vl") -> Path:
    """Write a model directory as it is published, but without weights and with a byte-level tokenizer."""
    folder.mkdir()
    special = ["<|im_start|>", "<|im_end|>", *VISION_TOKENS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": special})
    fast.save_pretrained(folder)
    config = {"model_type": family, "image_token_id": 260, "video_token_id": 261}
    config |= {"vision_start_token_id": 258, "vision_end_token_id": 259}
    assert [fast.convert_tokens_to_ids(token) for token in ("<|image_pad|>", "<|video_pad|>")] == [260, 261]
    write_json(folder / "config.json", config)
    names = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": PROCESSORS[family]}
    write_json(folder / "preprocessor_config.json", IMAGE_SETTINGS | names)
    if family == "qwen3_vl":
        size = {"shortest_edge": 4096, "longest_edge": 160 * 1024}
        write_json(folder / "preprocessor_config.json", QWEN3_VL_SETTINGS | names | {"size": size})
        size = {"shortest_edge": 60 * 1024, "longest_edge": 400 * 1024}
        names["video_processor_type"] = "Qwen3VLVideoProcessor"
        write_json(folder / "video_preprocessor_config.json", QWEN3_VL_SETTINGS | names | {"size": size})
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    return folder


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content))
