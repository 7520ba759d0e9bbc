"""The GRPO update of TRL's GRPOTrainer: its reference pass, loss, gradient accumulation, backward pass and clipping."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.throughput.update_case import UpdateCase
from megatron_vcr1.throughput.update_plain import pixel_values, save_gradients, sequence_positions

MAX_BATCH = 8  # TRL's default per_device_train_batch_size
_VIDEO_NAMES = {"pixel_values": "pixel_values_videos", "image_grid_thw": "video_grid_thw"}


class TrlUpdate:
    """GRPOTrainer on one device, with the options of the case and TRL's defaults elsewhere.

    The rollout is split into microbatches of 8 responses, or of the largest smaller number that divides it, and every
    response repeats its prompt. TRL does not support videos: it receives each video as an image with several frames,
    and just before the model's forward pass the inputs are renamed to those of a video. Tokens, positions and gradients
    are therefore those of a video.

    Log-probs and entropies are computed by TRL: for the responses where its Triton kernels run, and for whole sequences
    on the CPU. Recomputation follows the case (TRL's default is to recompute), the weights have the case's dtype, and
    there is no autocast. Only logging and data loading of TRL's training loop are left out.
    """

    def __init__(self, case: UpdateCase) -> None:
        self.case = case
        self.config = ModelConfig.from_pretrained(case.model_dir)
        groups = case.groups(self.config)
        positions = sequence_positions(
            groups[0], self.config
        )  # the same for all groups, whose videos have the same size
        model = AutoModelForImageTextToText.from_pretrained(
            case.model_dir, dtype=getattr(torch, case.dtype), attn_implementation="sdpa"
        )
        if case.recompute != "none":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if case.reference_dir is not None:
            model.config._name_or_path = case.reference_dir  # the trainer loads its reference from there
        with tempfile.TemporaryDirectory(prefix="benchmark-trl-") as folder:
            rollout = _rollout(case, groups, self.config)
            self.trainer = _Trainer(rollout, positions, model=model, args=_options(case, folder))
        self.trainer.create_optimizer()

    @property
    def notes(self) -> dict[str, Any]:
        """Return the options that matter for interpreting the measurements."""
        options = self.trainer.args
        return {
            "responses_per_microbatch": options.per_device_train_batch_size,
            "gradient_accumulation_steps": options.gradient_accumulation_steps,
            "gradient_checkpointing": options.gradient_checkpointing,
            "use_bias_correction_kl": options.use_bias_correction_kl,
            "head_tokens": "responses" if torch.cuda.is_available() else "whole sequences",
            "video": "passed to TRL as an image with several frames, and to the model as a video with its positions",
        }

    def run(self) -> float:
        """Run one update and return the loss."""
        trainer = self.trainer
        trainer.model.zero_grad()
        losses = [
            trainer.training_step(trainer.model, [], None) for _ in range(trainer.args.gradient_accumulation_steps)
        ]
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        return float(torch.stack(losses).sum())

    def save_gradients(self, path: Path) -> None:
        """Save the clipped gradients of the last update by published names."""
        save_gradients(self.trainer.model, self.config, path)


class _Trainer(GRPOTrainer):
    """A GRPOTrainer with a given rollout: it starts after responses have been sampled and rewarded.

    Args:
        rollout: what GRPOTrainer keeps of a rollout, without the reference's log-probs.
        positions: mRoPE positions of every sequence, [3, num_tokens].
    """

    def __init__(self, rollout: dict[str, Any], positions: Tensor, **options: Any) -> None:
        # The trainer requires a data set, a reward function and a tokenizer, but uses none of them here.
        dataset = Dataset.from_dict({"prompt": [""] * options["args"].generation_batch_size})
        super().__init__(reward_funcs=_unused_reward, train_dataset=dataset, processing_class=_tokenizer(), **options)
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        self.positions = positions.to(self.args.device)
        self.rollout = {key: self._prepare_input(value) for key, value in rollout.items()}
        for model in (self.model, self.ref_model):
            if model is not None:
                model.register_forward_pre_hook(self._as_video, with_kwargs=True)

    def _as_video(self, model: Any, args: tuple[()], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        """Rename the images of a forward pass to videos, and add the positions of the case."""
        num_sequences = len(kwargs["input_ids"])
        named = {_VIDEO_NAMES.get(name, name): value for name, value in kwargs.items()}
        return args, {**named, "position_ids": self.positions[:, None].expand(3, num_sequences, -1)}

    def _generate_and_score_completions(self, inputs: list[Any]) -> dict[str, Any]:
        """Replace TRL's method: return the given rollout with the reference's log-probs as TRL computes them."""
        rollout = self.rollout
        if self.ref_model is None:
            return rollout
        vision = {key: rollout[key] for key in ("pixel_values", "image_grid_thw", "num_images")}
        with torch.no_grad():
            log_probs, *_ = self._get_per_token_logps_and_entropies(
                self.ref_model,
                torch.cat((rollout["prompt_ids"], rollout["completion_ids"]), dim=1),
                torch.cat((rollout["prompt_mask"], rollout["completion_mask"]), dim=1),
                rollout["completion_ids"].shape[1],
                batch_size=self.args.per_device_train_batch_size,
                **vision,
            )
        return {**rollout, "ref_per_token_logps": log_probs}

    def _send_telemetry(self) -> None:
        """Send nothing."""


def _options(case: UpdateCase, folder: str) -> GRPOConfig:
    num_responses = case.num_prompts * case.group_size
    batch = next(size for size in range(MAX_BATCH, 0, -1) if num_responses % size == 0)
    return GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=num_responses // batch,
        num_generations=case.group_size,
        max_completion_length=case.response_tokens,
        loss_type="grpo",  # the paper's mean over the tokens of a response
        beta=case.kl_coef if case.reference_dir else 0.0,
        use_bias_correction_kl=False,  # the paper's KL is not weighted by the ratio
        learning_rate=case.learning_rate,
        max_grad_norm=case.max_grad_norm,
        gradient_checkpointing=case.recompute != "none",
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )


def _rollout(case: UpdateCase, groups: Sequence[Group], config: ModelConfig) -> dict[str, Any]:
    """Return the groups of the case under GRPOTrainer's names, one row per response."""
    prompt_ids = torch.stack([group.prompt.token_ids for group in groups for _ in group.responses])
    completion_ids = torch.stack([response for group in groups for response in group.responses])
    videos = [video for group in groups for video in group.prompt.vision for _ in group.responses]
    patches = torch.cat([pixel_values(video, config.vision) for video in videos])
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids),
        "completion_ids": completion_ids,
        "completion_mask": torch.ones_like(completion_ids),
        "advantages": case.advantages().flatten(),
        "num_items_in_batch": torch.tensor(completion_ids.numel()),
        "pixel_values": patches.to(getattr(torch, case.dtype)),
        "image_grid_thw": torch.tensor([video.grid_thw for video in videos]),
        "num_images": [1] * len(videos),
    }


def _unused_reward(**columns: Any) -> list[float]:
    raise NotImplementedError("the rollout is given, so no reward is computed")


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"<end>": 0}, unk_token="<end>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<end>", eos_token="<end>")
