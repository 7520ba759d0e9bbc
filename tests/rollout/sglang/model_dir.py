"""A tiny random model for SGLang, with a tokenizer and a processor that match its token ids."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.data.model_dirs import PROCESSORS
from tests.model import tiny

END = 1  # tiny's eos_token_id


def create(family: str, folder: Path, seed: int = 0) -> Path:
    """Create a model directory whose tokens are the printable characters and numbers between `<` and `>`."""
    tiny.create(family, folder, seed=seed, mlp_only_layers=())  # SGLang supports experts in every layer only
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["in_chans"] = 3  # SGLang reads this key, which published Qwen2-VL models have
    (folder / "config.json").write_text(json.dumps(config))
    words = ["<unk>", "<|im_end|>", *map(chr, range(32, 127)), "\n"]
    special = {
        tiny.IMAGE_PAD: "<|image_pad|>",
        tiny.VIDEO_PAD: "<|video_pad|>",
        tiny.VISION_START: "<|vision_start|>",
        tiny.VISION_END: "<|vision_end|>",
    }
    words += [special.get(index, f"<{index}>") for index in range(len(words), tiny.VOCAB_SIZE)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": list(special.values())})
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(folder)
    processor = {"processor_class": PROCESSORS[family], "image_processor_type": "Qwen2VLImageProcessor"}
    settings = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 56 * 56}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor | settings))
    if family.startswith("qwen3_vl"):
        processor["video_processor_type"] = "Qwen3VLVideoProcessor"
        (folder / "video_preprocessor_config.json").write_text(json.dumps(processor | settings))
    return folder
