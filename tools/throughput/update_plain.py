"""The GRPO update as public trainers compute it with transformers: each response with a copy of its prompt."""

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
from megatron_vcr1.model.hf_layout import published_name
from megatron_vcr1.model.mrope import prompt_positions
from throughput.update_case import UpdateCase


class PlainUpdate:
    """transformers' model with SDPA attention, on one device.

    The policy's forward pass and the reference's, log_softmax and gather a response at a time (which spares memory),
    the loss with KL, backward, clipping, AdamW.

    Args:
        full_logits: logits for the whole sequence; otherwise behind response tokens only, by `logits_to_keep`.
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
        kind = transformers.AutoModelForImageTextToText
        model = kind.from_pretrained(folder, dtype=getattr(torch, self.case.dtype), attn_implementation="sdpa")
        return model.to(self.device)

    def run(self) -> float:
        """Forward and backward a group at a time, clipping, optimizer. Returns the loss."""
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
        """Of the last update, clipped, by published names."""
        save_gradients(self.model, path)

    def _loss(self, group: Group, advantages: Tensor) -> Tensor:
        inputs = self._inputs(group)
        targets = torch.stack(group.responses).to(self.device)
        log_probs = self._log_probs(self.model, inputs, targets)
        ratio = (log_probs - log_probs.detach()).exp()
        token_loss = -ratio * advantages[:, None]
        if self.reference is not None:
            with torch.no_grad():
                reference = self._log_probs(self.reference, inputs, targets)
            difference = reference - log_probs
            token_loss = token_loss + self.case.kl_coef * (difference.exp() - difference - 1)  # k3
        return token_loss.mean(1).mean()

    def _log_probs(self, model: Any, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
        """[group_size, response_tokens]."""
        num_targets = targets.shape[1]
        keep = 0 if self.full_logits else num_targets + 1
        logits = model(**inputs, use_cache=False, logits_to_keep=keep).logits[:, :-1]
        token_ids = inputs["input_ids"][:, -logits.shape[1] :]
        rows = [row.log_softmax(-1).gather(1, ids[:, None])[:, 0] for row, ids in zip(logits, token_ids, strict=True)]
        return torch.stack(rows)[:, -num_targets:].float()

    def _inputs(self, group: Group) -> dict[str, Tensor]:
        """Prompt and video once for every response."""
        prompt, copies = group.prompt, len(group.responses)
        positions = sequence_positions(group, self.config)
        token_ids = torch.cat((prompt.token_ids.expand(copies, -1), torch.stack(group.responses)), dim=1)
        (video,) = prompt.vision
        dtype = getattr(torch, self.case.dtype)
        inputs = {
            "input_ids": token_ids,
            "attention_mask": torch.ones_like(token_ids),
            "position_ids": positions[:, None].expand(3, copies, -1),
            "pixel_values_videos": pixel_values(video, self.config.vision).repeat(copies, 1).to(dtype),
            "video_grid_thw": torch.tensor([video.grid_thw]).repeat(copies, 1),
        }
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}


def save_gradients(model: torch.nn.Module, path: Path) -> None:
    """Write the gradients of a transformers model by published names."""
    gradients = {published_name(name): one.grad for name, one in model.named_parameters()}
    save_file({name: one.contiguous() for name, one in gradients.items() if one is not None}, path)


def sequence_positions(group: Group, config: ModelConfig) -> Tensor:
    """mRoPE positions of the prompt and a response, [3, tokens]; the responses of a case are of one length."""
    prompt = group.prompt
    positions = prompt_positions(
        prompt.token_ids,
        [(item.grid_thw, item.seconds_per_grid) for item in prompt.vision],
        vision_token_ids=frozenset((config.image_token_id, config.video_token_id)),
        merge_size=config.vision.merge_size,
        tokens_per_second=config.vision.tokens_per_second,
    )
    behind = torch.arange(len(group.responses[0])) + int(positions.max()) + 1
    return torch.cat((positions, behind.expand(3, -1)), dim=1)


def pixel_values(video: VisionInput, vision: VisionConfig) -> Tensor:
    """Normalised patches as transformers' processors lay them out, [patches, patch_dim].

    Patches by time and by merge unit, their numbers by channel, frame, row and column.
    """
    steps, height, width = video.grid_thw
    merge, patch = vision.merge_size, vision.patch_size
    pixels = (video.frames.float() / 255 - torch.tensor(vision.pixel_mean)) / torch.tensor(vision.pixel_std)
    down, across = (height // merge, merge, patch), (width // merge, merge, patch)
    pixels = pixels.reshape(steps, vision.temporal_patch_size, *down, *across, vision.in_channels)
    return pixels.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(steps * height * width, -1)
