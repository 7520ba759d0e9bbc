"""The GRPO update of this package, as its trainer computes it after a rollout, at any layout.

Groups are packed with a shared prompt, and the head is fused with the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from megatron_vcr1.checkpoint.hf_stream import stream_hf_tensors
from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh, schedule
from megatron_vcr1.throughput.update_case import UpdateCase
from megatron_vcr1.training.grpo.batch import Counts, PolicyBatch, PolicyGroup, make_policy_batches
from megatron_vcr1.training.grpo.objective import grpo_loss, objective_from_settings
from megatron_vcr1.training.optimizer import Learner
from megatron_vcr1.training.reference import Reference


class OurUpdate:
    """This rank's part of the update. Use it inside `mesh.world`, and call its methods on all ranks."""

    def __init__(self, case: UpdateCase) -> None:
        self.case = case
        self.run_config = case.run_config
        config = ModelConfig.from_pretrained(case.model_dir)
        has_weights = (Path(case.model_dir) / "model.safetensors.index.json").is_file()
        self.model = build_model(
            config,
            self.run_config.model,
            self.run_config.parallel,
            self.run_config.recompute,
            initialize_weights=not has_weights,
        ).to(mesh.device())
        self.learner = Learner(self.model, self.run_config.optimizer, num_steps=10**6)
        self.reference: Reference | None = None
        if case.reference_dir is not None:
            if has_weights:
                load_model_weights(self.model, Path(case.reference_dir))
            self.reference = Reference(self.learner.ddp_model, self.run_config.grpo.reference)
        if has_weights:
            load_model_weights(self.model, Path(case.model_dir))
            self.learner.optimizer.reload_model_params()
        self.batches = self._batches(config)

    def _batches(self, config: ModelConfig) -> list[PolicyBatch]:
        """Create the microbatches of this replica, as the trainer does after a rollout."""
        case = self.case
        groups = [
            PolicyGroup(
                group.id,
                group.prompt,
                group.responses,
                advantages=tuple(advantages.tolist()),
                rollout_log_probs=tuple((0.0,) * len(response) for response in group.responses),
            )
            for group, advantages in zip(case.groups(config), case.advantages(), strict=True)
        ]
        num_responses = case.num_prompts * case.group_size
        return make_policy_batches(
            groups[mesh.replica_index() :: mesh.num_replicas()],
            Counts(num_responses, num_responses * case.response_tokens),
            self.model,
            microbatch_tokens=case.microbatch_tokens,
            normalization="sequence",
            max_new_tokens=case.response_tokens,
        )

    def run(self) -> float:
        """Run one update, including the log-probs of the reference. Return the loss over all ranks."""
        objective = objective_from_settings(self.run_config.grpo)

        def loss(batch: PolicyBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
            return grpo_loss(self.model, hidden, batch, objective, temperature=1.0).loss, {}

        return self.learner.update(self._with_reference(), loss).loss

    def _with_reference(self) -> list[PolicyBatch]:
        """Add the reference's log-probs to the microbatches."""
        if self.reference is None:
            return self.batches

        def collect(batch: PolicyBatch, hidden: Tensor) -> Tensor:
            return self.model.log_probs(hidden, batch.packed.target_ids)

        with self.reference.swapped_in():
            log_probs = schedule.forward_only(self.model, self.batches, collect, model_input=lambda batch: batch.packed)
        if not log_probs:  # not the last stage
            return self.batches
        return [replace(batch, ref_log_probs=values) for batch, values in zip(self.batches, log_probs, strict=True)]

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
