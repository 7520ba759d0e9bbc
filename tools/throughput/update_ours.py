"""The GRPO update by this package: packed groups, shared prompts, the head fused with the loss, at any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from safetensors.torch import save_file
from torch import Tensor
from vcr1_kernels import linear_grpo_loss

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.checkpoint.pieces import parameter_pieces
from megatron_vcr1.data.packing import pack_groups
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import model_layout, to_hf
from megatron_vcr1.model.packed_batch import PackedBatch, pack
from megatron_vcr1.model.qwen_vl import QwenVLModel, build_model
from megatron_vcr1.parallel import groups, schedule
from throughput.update_case import UpdateCase


class OurUpdate:
    """This rank's share of the update, inside `groups.world`."""

    def __init__(self, case: UpdateCase) -> None:
        self.case = case
        self.config = ModelConfig.from_pretrained(case.model_dir)
        self.model = self._build(case.model_dir).train()
        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.parallel = DistributedDataParallel(self.model.config, DistributedDataParallelConfig(), self.model)
        self.reference = self._build(case.reference_dir).eval() if case.reference_dir else None
        every = case.groups(self.config)
        mine = [every[index] for index in range(groups.copy_index(), len(every), groups.num_copies())]
        advantages = {group.id: row for group, row in zip(every, case.advantages(), strict=True)}
        rows_multiple_of = case.tensor if case.sequence_parallel else 1
        self.batches: list[PackedBatch] = []
        self.advantages: list[Tensor] = []  # of each batch, [targets]
        for microbatch in pack_groups(mine, case.microbatch_tokens):
            batch = pack(microbatch, self.config, rows_multiple_of=rows_multiple_of).to(groups.device())
            of_responses = torch.cat([advantages[group.id] for group in microbatch])
            of_targets = of_responses.repeat_interleave(case.response_tokens)
            self.batches.append(batch)
            self.advantages.append(of_targets.to(groups.device()))

    def _build(self, folder: str) -> QwenVLModel:
        has_weights = (Path(folder) / "model.safetensors.index.json").is_file()
        model = build_model(self.config, self.case.run_config, initialize_weights=not has_weights).to(groups.device())
        if has_weights:
            load_model_weights(model, Path(folder))
        return model

    def run(self) -> float:
        """Forward and backward over this copy's groups; gradients are summed over copies. Returns its loss."""
        self.parallel.zero_grad_buffer()
        references: list[Tensor | None] = [None] * len(self.batches)
        if self.reference is not None:
            reference = self.reference

            def collect(batch: PackedBatch, hidden: Tensor) -> Tensor:
                return reference.log_probs(hidden, batch.target_ids)

            references = list(schedule.forward_only(reference, self.batches, collect)) or references
        num_targets = self.case.num_prompts * self.case.group_size * self.case.response_tokens

        def loss(batch: PackedBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
            index = next(i for i, one in enumerate(self.batches) if one is batch)
            result = linear_grpo_loss(
                hidden,
                self.model.head_weight(),
                batch.target_ids,
                self.advantages[index],
                token_weights=torch.full_like(self.advantages[index], 1 / num_targets),
                ref_log_probs=references[index],
                kl_coef=self.case.kl_coef if self.reference is not None else 0.0,
                group=self.model.tensor_group,
            )
            return result.loss, {"loss": result.loss.detach()}

        metrics = schedule.forward_backward(self.parallel, self.batches, loss)
        return float(sum(one["loss"] for one in metrics))

    def save_gradients(self, path: Path) -> None:
        """By published names; in a world of one."""
        whole: dict[str, Tensor] = {}
        layouts = model_layout(self.config)
        for parameter, pieces in parameter_pieces(self.model).items():
            gradient: Tensor = parameter.main_grad  # type: ignore[attr-defined]  # of megatron-core's buffer
            parts = gradient.view(-1).split([len(piece.values) for piece in pieces])
            for piece, part in zip(pieces, parts, strict=True):
                tensor = whole.setdefault(piece.key, part.new_empty(layouts[piece.key].shape))
                tensor[piece.offsets[0] : piece.offsets[0] + piece.shape[0]] = part.view(piece.shape)
        gradients = {name: one for key, tensor in whole.items() for name, one in to_hf(layouts[key], tensor).items()}
        save_file({name: one.contiguous() for name, one in gradients.items()}, path)
