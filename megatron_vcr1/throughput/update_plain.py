"""The GRPO update as public trainers compute it with transformers: every response repeats its prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from megatron_vcr1.data.encoding import VisionInput
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig, VisionConfig
from megatron_vcr1.model.hf_layout import hf_shapes, model_layout, published_name
from megatron_vcr1.model.mrope import prompt_positions
from megatron_vcr1.throughput.update_case import UpdateCase


class PlainUpdate:
    """transformers' model with SDPA attention and torch's AdamW, on one device.

    log_softmax and gather run on one response at a time, which saves memory.

    Args:
        full_logits: compute logits for the whole sequence; otherwise only for response tokens, by `logits_to_keep`.
    """

    def __init__(self, case: UpdateCase, *, full_logits: bool) -> None:
        self.case = case
        self.full_logits = full_logits
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = ModelConfig.from_pretrained(case.model_dir)
        self.model = self._load(case.model_dir).train()
        if case.recompute != "none":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.reference = None if case.reference_dir is None else self._load(case.reference_dir).eval()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=case.learning_rate, weight_decay=0.0)
        self.groups = case.groups(self.config)
        self.advantages = case.advantages().to(self.device)

    def _load(self, folder: str) -> Any:
        auto = transformers.AutoModelForImageTextToText
        model = auto.from_pretrained(folder, dtype=getattr(torch, self.case.dtype), attn_implementation="sdpa")
        return model.to(self.device)

    def run(self) -> float:
        """Run one update, one group at a time, and return the loss."""
        self.model.zero_grad()
        total = 0.0
        for group, advantages in zip(self.groups, self.advantages, strict=True):
            loss = self._loss(group, advantages) / len(self.groups)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.case.max_grad_norm)
        self.optimizer.step()
        return total

    def save_gradients(self, path: Path) -> None:
        """Save the clipped gradients of the last update by published names."""
        save_gradients(self.model, self.config, path)

    def _loss(self, group: Group, advantages: Tensor) -> Tensor:
        inputs = self._inputs(group)
        targets = torch.stack(group.responses).to(self.device)
        log_probs = self._log_probs(self.model, inputs, targets)
        ratio = (log_probs - log_probs.detach()).exp()  # 1, with a gradient
        token_loss = -ratio * advantages[:, None]
        if self.reference is not None:
            with torch.no_grad():
                reference = self._log_probs(self.reference, inputs, targets)
            difference = reference - log_probs
            token_loss = token_loss + self.case.kl_coef * (difference.exp() - difference - 1)  # k3 estimator
        return token_loss.mean(1).mean()

    def _log_probs(self, model: Any, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        """Return the log-probs of the responses, [group_size, response_tokens]."""
        num_targets = targets.shape[1]
        keep = 0 if self.full_logits else num_targets + 1  # 0 keeps all
        logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits[:, :-1]
        token_ids = inputs["input_ids"][:, -logits.shape[1] :]
        rows = [row.log_softmax(-1).gather(1, ids[:, None])[:, 0] for row, ids in zip(logits, token_ids, strict=True)]
        return torch.stack(rows)[:, -num_targets:].float()

    def _inputs(self, group: Group) -> dict[str, Tensor]:
        """Repeat prompt and video for every response."""
        prompt, repeats = group.prompt, len(group.responses)
        positions = sequence_positions(group, self.config)
        token_ids = torch.cat((prompt.token_ids.expand(repeats, -1), torch.stack(group.responses)), dim=1)
        (video,) = prompt.vision
        dtype = getattr(torch, self.case.dtype)
        inputs = {
            "input_ids": token_ids,
            "attention_mask": torch.ones_like(token_ids),
            "position_ids": positions[:, None].expand(3, repeats, -1),
            "pixel_values_videos": pixel_values(video, self.config.vision).repeat(repeats, 1).to(dtype),
            "video_grid_thw": torch.tensor([video.grid_thw]).repeat(repeats, 1),
        }
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}


def save_gradients(model: torch.nn.Module, config: ModelConfig, path: Path) -> None:
    """Save the gradients of a transformers model by published names."""
    published = hf_shapes(model_layout(config))
    gradients = {published_name(name, published): parameter.grad for name, parameter in model.named_parameters()}
    save_file({name: grad.contiguous() for name, grad in gradients.items() if grad is not None}, path)


def sequence_positions(group: Group, config: ModelConfig) -> Tensor:
    """Return the mRoPE positions of a prompt and a response, [3, num_tokens]; all responses have the same length."""
    positions = prompt_positions(config, group.prompt)
    response = torch.arange(len(group.responses[0])) + int(positions.max()) + 1
    return torch.cat((positions, response.expand(3, -1)), dim=1)


def pixel_values(video: VisionInput, vision: VisionConfig) -> Tensor:
    """Return the normalized patches in the order of transformers' processors, [num_patches, patch_dim].

    Patches are ordered by time and merge unit, and the values of a patch by channel, frame, row and column.
    """
    steps, height, width = video.grid_thw
    merge, patch = vision.merge_size, vision.patch_size
    pixels = (video.frames.float() / 255 - torch.tensor(vision.pixel_mean)) / torch.tensor(vision.pixel_std)
    down, across = (height // merge, merge, patch), (width // merge, merge, patch)
    pixels = pixels.reshape(steps, vision.temporal_patch_size, *down, *across, vision.in_channels)
    return pixels.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(steps * height * width, -1)
