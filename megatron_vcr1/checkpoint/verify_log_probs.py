"""Comparison of a model's log-probs with those of transformers, for one prompt with an image."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from vcr1_kernels import frames_to_patches

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.encoding import EncodedPrompt, VisionInput
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.packed_batch import pack
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh

_NUM_TEXT_TOKENS, _NUM_RESPONSE_TOKENS = 16, 32
_IMAGE_TOKENS = (6, 10)  # height and width of the image in vision tokens: more than one attention window


def log_prob_differences(hf_dir: Path, model_dir: Path) -> Tensor:
    """Compare the log-probs of a random response to a prompt of random text and a random image, in float32.

    Both models are loaded whole, on the GPU if there is one. Runs in a single process.

    Args:
        hf_dir: Hugging Face directory, loaded by transformers.
        model_dir: the same model as a Hugging Face directory, an imported model or a training checkpoint, loaded by
            this package.

    Returns:
        [num_response_tokens], float32: this package's log-probs minus those of transformers.
    """
    config = ModelConfig.from_pretrained(model_dir)
    prompt, response = _probe(config)
    run = RunConfig.model_validate({"model": {"path": model_dir, "dtype": "float32"}})
    with mesh.world(run.parallel), torch.inference_mode():
        expected = _transformers_log_probs(hf_dir, config, prompt, response)
        model = build_model(config, run.model, run.parallel, run.recompute).eval()
        load_model_weights(model, model_dir)
        batch = pack([Group("probe", prompt, (response,))], config).to(mesh.device())
        return model.log_probs(model(batch), batch.target_ids).cpu() - expected


def _probe(config: ModelConfig) -> tuple[EncodedPrompt, Tensor]:
    """Return a prompt and a response of random tokens, which depend on the seed and the model's sizes only."""
    generator = torch.Generator().manual_seed(0)
    height, width = _IMAGE_TOKENS
    merge_size = config.vision.merge_size
    pixels_per_token = merge_size * config.vision.patch_size
    frames = torch.randint(
        0, 256, (1, height * pixels_per_token, width * pixels_per_token, 3), dtype=torch.uint8, generator=generator
    )
    image = VisionInput(frames, (1, height * merge_size, width * merge_size), seconds_per_grid=None)
    # Token ids below the pads are text.
    num_text_ids = min(config.text.vocab_size, config.image_token_id, config.video_token_id)
    before, after = torch.randint(0, num_text_ids, (2, _NUM_TEXT_TOKENS), generator=generator)
    pads = torch.full((height * width,), config.image_token_id)
    response = torch.randint(0, num_text_ids, (_NUM_RESPONSE_TOKENS,), generator=generator)
    return EncodedPrompt(torch.cat((before, pads, after)), (image,)), response


def _transformers_log_probs(hf_dir: Path, config: ModelConfig, prompt: EncodedPrompt, response: Tensor) -> Tensor:
    """Return transformers' log-probs of the response tokens: [num_response_tokens], float32."""
    from transformers import AutoModelForImageTextToText  # slow to import

    device = mesh.device()
    model = AutoModelForImageTextToText.from_pretrained(hf_dir, dtype=torch.float32).to(device).eval()
    (image,) = prompt.vision
    vision = config.vision
    patches = frames_to_patches(
        image.frames,
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.merge_size,
        mean=vision.pixel_mean,
        std=vision.pixel_std,
    )
    token_ids = torch.cat((prompt.token_ids, response[:-1])).to(device)
    output = model(
        input_ids=token_ids[None],
        attention_mask=torch.ones_like(token_ids)[None],
        pixel_values=patches.to(device),
        image_grid_thw=torch.tensor([image.grid_thw], device=device),
        mm_token_type_ids=(token_ids == config.image_token_id).int()[None],
        use_cache=False,
    )
    log_probs = output.logits[0, -len(response) :].log_softmax(-1)
    return log_probs.gather(1, response[:, None].to(device))[:, 0].cpu()
