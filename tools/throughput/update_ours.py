"""The GRPO update of this package, as its trainer computes it after a rollout, at any layout.

Groups are packed with a shared prompt, and the head is fused with the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_vcr1.checkpoint.hf_stream import stream_hf_tensors
from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.packed_batch import PackedBatch
from megatron_vcr1.model.qwen_vl import build_model
from megatron_vcr1.parallel import mesh, schedule
from megatron_vcr1.training.grpo.objective import Counts, TokenData, grpo_loss, token_weights
from megatron_vcr1.training.grpo.trainer import PolicyBatch
from megatron_vcr1.training.microbatches import make_microbatches
from megatron_vcr1.training.optimizer import Learner
from megatron_vcr1.training.reference import Reference
from throughput.update_case import UpdateCase


class OurUpdate:
    """This rank's part of the update. Use it inside `mesh.world`, and call its methods on all ranks."""

    def __init__(self, case: UpdateCase) -> None:
        self.case = case
        self.run_config = case.run_config
        config = ModelConfig.from_pretrained(case.model_dir)
        has_weights = (Path(case.model_dir) / "model.safetensors.index.json").is_file()
        self.model = build_model(config, self.run_config, initialize_weights=not has_weights).to(mesh.device())
        self.learner = Learner(self.model, self.run_config.optimizer, num_steps=10**6)
        self.reference: Reference | None = None
        if case.reference_dir is not None:
            if has_weights:
                load_model_weights(self.model, Path(case.reference_dir))
            self.reference = Reference(self.model, self.run_config.grpo.reference)
        if has_weights:
            load_model_weights(self.model, Path(case.model_dir))
            self.learner.optimizer.reload_model_params()
        self.batches = self._batches(config)

    def _batches(self, config: ModelConfig) -> list[PolicyBatch]:
        """Create the microbatches of this replica, as the trainer does after a rollout."""
        case = self.case
        groups = case.groups(config)
        advantages = {group.id: row for group, row in zip(groups, case.advantages(), strict=True)}
        mine = groups[mesh.replica_index() :: mesh.num_replicas()]
        num_responses = case.num_prompts * case.group_size
        counts = Counts(num_responses, num_responses * case.response_tokens)
        batches = []
        for microbatch in make_microbatches(mine, self.model, case.microbatch_tokens):
            lengths = torch.tensor(microbatch.packed.response_lengths)
            response_advantages = torch.cat([advantages[group.id] for group in microbatch.groups])
            data = TokenData(
                advantages=response_advantages.repeat_interleave(lengths),
                rollout_log_probs=torch.zeros(int(lengths.sum())),
                segment_ids=torch.arange(len(lengths)).repeat_interleave(lengths),
            )
            weights = token_weights(microbatch.packed.response_lengths, counts, "sequence", case.response_tokens)
            batches.append(PolicyBatch(microbatch.packed, data.to(mesh.device()), weights.to(mesh.device())))
        return batches

    def run(self) -> float:
        """Run one update, including the log-probs of the reference. Return the loss over all ranks."""
        by_packed = {id(batch.packed): batch for batch in self._with_reference()}

        def loss(packed: PackedBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
            batch = by_packed[id(packed)]
            settings = self.run_config.grpo
            result = grpo_loss(self.model, hidden, packed, batch.data, batch.weights, settings, temperature=1.0)
            return result.loss, {}

        return self.learner.update([batch.packed for batch in self.batches], loss).loss

    def _with_reference(self) -> list[PolicyBatch]:
        """Add the reference's log-probs to the microbatches."""
        if self.reference is None:
            return self.batches

        def collect(batch: PackedBatch, hidden: Tensor) -> Tensor:
            return self.model.log_probs(hidden, batch.target_ids)

        with self.reference.in_place():
            log_probs = schedule.forward_only(self.model, [batch.packed for batch in self.batches], collect)
        if not log_probs:  # not the last stage
            return self.batches
        return [
            replace(batch, data=replace(batch.data, ref_log_probs=values))
            for batch, values in zip(self.batches, log_probs, strict=True)
        ]

    def save_gradients(self, path: Path) -> None:
        """Save the clipped gradients of the last update by published names; the first rank writes the file."""
        with self._gradients_as_weights():
            gradients = {name: tensor.float().cpu().clone() for name, tensor in stream_hf_tensors(self.model)}
        if mesh.is_first_rank():
            save_file(gradients, path)

    @contextmanager
    def _gradients_as_weights(self) -> Iterator[None]:
        """Swap the gradients into the parameters within the with-block, so that gathering weights gathers gradients."""
        parameters = list(self.model.parameters())
        weights = [parameter.data for parameter in parameters]
        try:
            for parameter in parameters:
                parameter.data = parameter.main_grad
            yield
        finally:
            for parameter, values in zip(parameters, weights, strict=True):
                parameter.data = values
