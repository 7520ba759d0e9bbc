"""Small random models of all families with awkward sizes, and transformers' results for them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_vcr1.data.encoding import EncodedPrompt, VisionInput
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.mrope import prompt_positions

VOCAB_SIZE = 204
IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END = 190, 191, 192, 193
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe")


_CONFIGS = {
    "qwen2_5_vl": transformers.Qwen2_5_VLConfig,
    "qwen2_vl": transformers.Qwen2VLConfig,
    "qwen3_vl": transformers.Qwen3VLConfig,
    "qwen3_vl_moe": transformers.Qwen3VLMoeConfig,
}
_MODELS = {
    "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
    "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
    "qwen3_vl": transformers.Qwen3VLForConditionalGeneration,
    "qwen3_vl_moe": transformers.Qwen3VLMoeForConditionalGeneration,
}


def hf_config(
    family: str, *, vision_ffn: int = 36, mlp_only_layers: Sequence[int] = (1,), **overrides: int
) -> transformers.PretrainedConfig:
    """Return a configuration: 12 heads and 2 key-value heads of 8 features, windows of 2 x 2 merge units.

    Qwen2-VL and the dense Qwen3-VL have tied embeddings.

    Args:
        vision_ffn: inner features of the MLPs in Qwen2.5-VL's vision tower.
        mlp_only_layers: layers with an ordinary MLP in a model with experts.
    """
    tokens = dict(image_token_id=IMAGE_PAD, video_token_id=VIDEO_PAD)
    tokens |= dict(vision_start_token_id=VISION_START, vision_end_token_id=VISION_END)
    text: dict[str, Any] = dict(
        vocab_size=VOCAB_SIZE,
        hidden_size=96,
        intermediate_size=100,
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
        bos_token_id=0,
        eos_token_id=1,
    )
    if family == "qwen3_vl_moe":  # two of four experts for each token
        text |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40)
        text |= dict(mlp_only_layers=list(mlp_only_layers))
    if family.startswith("qwen3_vl"):  # heads of 10 features, which are not hidden_size / num_attention_heads
        text["rope_parameters"] |= {"mrope_section": [2, 2, 1], "mrope_interleaved": True}
        text |= dict(head_dim=10, pad_token_id=None)
    vision: dict[str, Any] = dict(depth=3, num_heads=4, patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
    if family == "qwen2_5_vl":
        vision |= dict(hidden_size=32, intermediate_size=vision_ffn, out_hidden_size=96)
        vision |= dict(window_size=56, fullatt_block_indexes=[1], tokens_per_second=2)
    elif family == "qwen2_vl":
        vision |= dict(embed_dim=32, hidden_size=96, mlp_ratio=4)
    else:  # the features of three layers, two of which are neighbours, for three of the four language layers
        vision |= dict(depth=5, hidden_size=32, intermediate_size=36, out_hidden_size=96)
        vision |= dict(num_position_embeddings=25, deepstack_visual_indexes=[0, 2, 3])
    return _CONFIGS[family](
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=family in ("qwen2_vl", "qwen3_vl"),
        **{**tokens, **overrides},
    )


def create(family: str, folder: Path, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """Create a random model and save it in Hugging Face format."""
    model = _MODELS[family](hf_config(family, **overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            is_scale = ("norm" in name.lower() and name.endswith("weight")) or "ln_q.weight" in name
            parameter.copy_(noise + 1 if is_scale else noise)
    model = model.float().eval()
    model.save_pretrained(folder)
    if family == "qwen3_vl_moe":
        _transpose_experts(folder / "model.safetensors")
    if family.startswith("qwen3_vl"):  # the statistics that `_pixel_values` uses are not this family's defaults
        settings = {"patch_size": 14, "image_mean": MEAN, "image_std": STD}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def _transpose_experts(path: Path) -> None:
    """Store the experts as in the published files; transformers 5 writes them transposed, and reads both."""
    tensors = load_file(path)
    tensors |= {name: tensor.transpose(1, 2).contiguous() for name, tensor in tensors.items() if ".experts." in name}
    save_file(tensors, path, metadata={"format": "pt"})


def vision_input(
    generator: torch.Generator, frames: int, height: int, width: int, seconds: float | None
) -> VisionInput:
    pixels = torch.randint(0, 256, (frames, height * 14, width * 14, 3), dtype=torch.uint8, generator=generator)
    return VisionInput(frames=pixels, grid_thw=(max(frames // 2, 1), height, width), seconds_per_grid=seconds)


def prompt(kinds: str, seed: int, *, timestamps: bool = False) -> EncodedPrompt:
    """Return a prompt with random text between images and videos.

    Args:
        kinds: one letter for each: i(mage) or v(ideo).
        seed: seed of the random text and pixels.
        timestamps: put every temporal patch of a video after text of its own.
    """
    generator = torch.Generator().manual_seed(seed)

    def text(num_tokens: int) -> Tensor:
        return torch.randint(2, 190, (num_tokens,), generator=generator)

    ids, inputs = [text(3)], []
    for index, kind in enumerate(kinds):
        if kind == "i":
            item, pad = vision_input(generator, 1, 6 + 4 * index, 10, None), IMAGE_PAD
        else:  # an odd grid, and time steps that are not whole seconds
            item, pad = vision_input(generator, 6, 4, 10 - 4 * index, 0.8 + index), VIDEO_PAD
        inputs.append(item)
        num_runs = item.grid_thw[0] if timestamps else 1
        run = [torch.tensor([VISION_START]), torch.full((item.num_tokens(2) // num_runs,), pad)]
        for _ in range(num_runs):
            ids += [*run, torch.tensor([VISION_END]), text(4)]
    return EncodedPrompt(torch.cat(ids), tuple(inputs))


def responses(lengths: tuple[int, ...], seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(2, 190, (length,), generator=generator) for length in lengths)


def _pixel_values(item: VisionInput) -> Tensor:
    """Return flattened patches in the order of the published processors.

    Rows are ordered by (t, h/2, w/2, 2, 2), columns by (channel, frame, y, x).
    """
    frames = item.frames if len(item.frames) > 1 else item.frames.repeat(2, 1, 1, 1)
    pixels = (frames.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    t, h, w = item.grid_thw
    pixels = pixels.reshape(t, 2, h // 2, 2, 14, w // 2, 2, 14, 3)
    return pixels.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(t * h * w, -1)


def transformers_inputs(item: EncodedPrompt, response: Tensor | None = None) -> dict[str, Any]:
    """Return the inputs of transformers' models for a prompt and a response after it, without positions."""
    ids = (item.token_ids if response is None else torch.cat((item.token_ids, response)))[None]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    images = [vision for vision in item.vision if vision.seconds_per_grid is None]
    videos = [vision for vision in item.vision if vision.seconds_per_grid is not None]
    if images:
        inputs["pixel_values"] = torch.cat([_pixel_values(vision) for vision in images])
        inputs["image_grid_thw"] = torch.tensor([vision.grid_thw for vision in images])
    if videos:
        inputs["pixel_values_videos"] = torch.cat([_pixel_values(vision) for vision in videos])
        inputs["video_grid_thw"] = torch.tensor([vision.grid_thw for vision in videos])
    return inputs


def transformers_logits(model: torch.nn.Module, config: ModelConfig, item: EncodedPrompt, response: Tensor) -> Tensor:
    """Return transformers' logits for each token of a response after a prompt, [tokens, vocab_size]."""
    positions = prompt_positions(config, item)
    tail = (torch.arange(len(response)) + int(positions.max()) + 1).expand(3, -1)
    output = model(
        **transformers_inputs(item, response),
        position_ids=torch.cat((positions, tail), dim=1)[:, None],
        use_cache=False,
    )
    start = len(item.token_ids) - 1
    return output.logits[0, start : start + len(response)]


def save_gradients(model: torch.nn.Module, folder: Path, source: Path) -> None:
    """Save a model's gradients as if they were weights, so that the expected gradients can be loaded in any layout."""
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    model = _clone_with_gradients(model)
    model.save_pretrained(folder)


def _clone_with_gradients(model: torch.nn.Module) -> torch.nn.Module:
    clone = type(model)(model.config).float()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in clone.named_parameters():
            gradient = parameters[name].grad
            parameter.copy_(torch.zeros_like(parameter) if gradient is None else gradient)
    return clone
