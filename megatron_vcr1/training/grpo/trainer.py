"""The GRPO trainer: group relative policy optimization (VideoChat-R1, section 3.1; DeepSeekMath, arXiv:2402.03300)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from megatron_vcr1.config.data_sections import DataSource
from megatron_vcr1.config.model_sections import RecomputeSection
from megatron_vcr1.config.rollout_sections import RolloutSection
from megatron_vcr1.config.training_sections import GrpoSection, TrainSection
from megatron_vcr1.data.loader import SkippedSample
from megatron_vcr1.model.vision_features import FeatureMemo
from megatron_vcr1.parallel import mesh, schedule
from megatron_vcr1.rollout.engine import RolloutEngine
from megatron_vcr1.training.grpo.balance import deal_by_work
from megatron_vcr1.training.grpo.batch import PolicyBatch, make_policy_batches, split_into_minibatches
from megatron_vcr1.training.grpo.objective import (
    add_policy_metrics,
    grpo_loss,
    objective_from_settings,
    policy_statistics,
)
from megatron_vcr1.training.grpo.rollout_source import RolloutSource, StepGroups
from megatron_vcr1.training.grpo.scoring import ScoredGroup, rollout_row
from megatron_vcr1.training.metrics import Metrics, add_forward_work, add_update_work
from megatron_vcr1.training.optimizer import Learner, Update
from megatron_vcr1.training.reference import Reference
from megatron_vcr1.training.trainer import StepResult


class GrpoTrainer:
    """Trains the policy so that responses with more than their group's mean reward become more likely."""

    def __init__(
        self,
        learner: Learner,
        source: RolloutSource,
        reference: Reference | None,
        *,
        releases_gradients: bool,
        data_sources: Sequence[DataSource],
        frozen_parts: Collection[str],
        recompute: RecomputeSection,
        train: TrainSection,
        grpo: GrpoSection,
        rollout: RolloutSection,
    ) -> None:
        """
        Args:
            source: supplies each step's groups; the trainer closes it.
            reference: the frozen policy of the KL term. None without a KL term.
            releases_gradients: whether the gradient buffers' memory is free while the engine samples, for colocated
                servers. The caller has released it before it started the servers.
            data_sources: data.sources, for the records of rollouts.
            frozen_parts: model.freeze, for the FLOPs of an update, like recompute.
        """
        self._learner = learner
        self._model = learner.model
        self._source = source
        self._reference = reference
        self._releases_gradients = releases_gradients
        self._data_sources = data_sources
        self._frozen_parts = frozen_parts
        self._recompute = recompute
        self._train = train
        self._grpo = grpo
        self._objective = objective_from_settings(grpo)
        self._skips_zero_advantages = self._objective.kl_coef == 0 and self._objective.entropy_coef == 0
        num_updates = grpo.epochs_per_rollout * grpo.num_minibatches
        # Whether microbatches are computed more than once, and always with the same vision features.
        self._keeps_features = {"vision_tower", "merger"} <= set(frozen_parts) and (
            reference is not None or num_updates > 1
        )
        self._rollout = rollout

    def step(self, step: int, metrics: Metrics) -> StepResult:
        """Get scored groups from the rollout source and update the policy with the objective (equation 2)."""
        version = self._source.policy_version
        if self._reference is not None:
            self._reference.prefetch()
        groups = self._source.next_groups(step, metrics)
        self._learner.restore_gradients()  # before the reference, whose weights the gradient buffers hold
        # All replicas have the same number of minibatches, though some of a replica's may be empty. All ranks therefore
        # do the same number of updates, whose collectives need every rank.
        minibatches = self._make_minibatches(groups.kept, metrics)
        if self._reference is not None:
            with metrics.time_phase("reference", wait_for_device=True), self._reference.swapped_in():
                minibatches = [self._with_log_probs(b, "ref_log_probs", "reference", metrics) for b in minibatches]
        num_passes = self._grpo.epochs_per_rollout
        if num_passes * len(minibatches) > 1:  # a single update is on-policy: its ratio is 1 without old log-probs
            with metrics.time_phase("old_log_probs", wait_for_device=True):
                minibatches = [self._with_log_probs(b, "old_log_probs", "old_log_probs", metrics) for b in minibatches]
        with metrics.time_phase("update", wait_for_device=True):
            updates = [
                self._update(batches, metrics, is_first_pass=index == 0)
                for index in range(num_passes)
                for batches in minibatches
            ]
            learning_rate = self._learner.end_step()
            self._learner.wait_for_parameters()  # the weight sync reads them
        del minibatches  # and the vision features in them: colocated servers need the memory
        if self._releases_gradients:
            self._learner.release_gradients()
        self._source.policy_updated(step, metrics)
        self._add_group_metrics(groups, version, metrics)
        return StepResult(
            applied=all(update.applied for update in updates),
            loss=_mean([update.loss for update in updates]),
            grad_norm=_mean([update.grad_norm for update in updates]),
            learning_rate=learning_rate,
            samples=tuple(group.prompt.sample.id for group in groups.kept),
            rollouts=self._rollout_rows(step, groups) if mesh.is_replica_leader() else {},
        )

    def _make_minibatches(self, groups: Sequence[ScoredGroup], metrics: Metrics) -> list[list[PolicyBatch]]:
        """Return the microbatches of each optimizer step of a pass over the groups, balanced between the replicas."""
        minibatches = []
        for minibatch, counts in split_into_minibatches(
            groups,
            self._grpo.num_minibatches,
            skip_zero_advantages=self._skips_zero_advantages,
        ):
            dealt = deal_by_work(minibatch, self._model.model_config, frozen_parts=self._frozen_parts)
            metrics.update_max("work_imbalance/before", dealt.imbalance_before)
            metrics.update_max("work_imbalance/after", dealt.imbalance)
            batches = make_policy_batches(
                dealt.groups,
                counts,
                self._model,
                microbatch_tokens=self._train.microbatch_tokens,
                normalization=self._grpo.loss_normalization,
                max_new_tokens=self._rollout.max_new_tokens,
            )
            if self._keeps_features:
                batches = [replace(batch, packed=replace(batch.packed, memo=FeatureMemo())) for batch in batches]
            minibatches.append(batches)
        return minibatches

    def _with_log_probs(
        self, batches: list[PolicyBatch], field: str, phase: str, metrics: Metrics
    ) -> list[PolicyBatch]:
        """Compute the log-probs of all targets with the model's current weights.

        Args:
            field: the field of `PolicyBatch` to set.
            phase: phase of the metrics to which the FLOPs belong.

        Returns:
            The batches with the field set on the last stage, which computes the loss; unchanged on other stages.
        """

        def log_probs(batch: PolicyBatch, hidden: Tensor) -> Tensor:
            return self._model.log_probs(hidden, batch.packed.target_ids, temperature=self._rollout.temperature)

        add_forward_work(metrics, phase, batches, self._model.model_config)
        if not batches:  # a forward pass has collectives within a replica only, so a replica without groups can skip it
            return batches
        values = schedule.forward_only(self._model, batches, log_probs, model_input=lambda batch: batch.packed)
        if not mesh.is_last_stage():
            return batches
        changes: list[dict[str, Any]] = [{field: value} for value in values]
        return [replace(batch, **change) for batch, change in zip(batches, changes, strict=True)]

    def _update(self, batches: Sequence[PolicyBatch], metrics: Metrics, *, is_first_pass: bool) -> Update:
        """Do one optimizer step, and add the statistics of its forward pass to the metrics."""
        add_update_work(
            metrics, batches, self._model.model_config, frozen_parts=self._frozen_parts, recompute=self._recompute
        )
        update = self._learner.update(batches, self._loss)
        if mesh.is_loss_rank():
            for batch, statistics in zip(batches, update.metrics, strict=True):
                add_policy_metrics(metrics, statistics, batch, with_mismatch=is_first_pass)
        return update

    def _loss(self, batch: PolicyBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        result = grpo_loss(self._model, hidden, batch, self._objective, temperature=self._rollout.temperature)
        return result.loss, policy_statistics(result)

    def _add_group_metrics(self, groups: StepGroups, version: int, metrics: Metrics) -> None:
        """Add the number of dropped groups, and the policy lag of the groups that were trained on.

        Args:
            version: version of the policy that the step trained.
        """
        if mesh.is_replica_leader():
            metrics.add_to_sum("groups/dropped", len(groups.dropped))
            for group in groups.kept:
                metrics.add_to_mean("policy_lag", version - group.rollouts[0].policy_version)
        metrics.update_max("policy_version", version)

    def _rollout_rows(self, step: int, groups: StepGroups) -> dict[int, dict[str, Any]]:
        """Return the rows of rollouts/step_N.jsonl by the position of their prompt."""
        trained = {
            group.prompt.position
            for group in groups.kept
            if (any(group.advantages) if self._skips_zero_advantages else group.scored_indices)
        }
        return {
            group.prompt.position: rollout_row(
                step,
                group,
                thinking=self._data_sources[group.prompt.source].thinking,
                trained=group.prompt.position in trained,
            )
            for group in (*groups.kept, *groups.dropped)
        }

    def engine_with_policy(self) -> RolloutEngine:
        return self._source.engine_with_policy()

    @property
    def is_out_of_data(self) -> bool:
        return self._source.is_exhausted

    def take_skipped(self) -> list[SkippedSample]:
        return self._source.take_skipped()

    def state_dict(self) -> dict[str, Any]:
        return self._source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._source.load_state_dict(state)

    def close(self) -> None:
        self._source.close()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
