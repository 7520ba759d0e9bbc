"""Group relative policy optimization (VideoChat-R1, section 3.1; DeepSeekMath, arXiv:2402.03300)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_vcr1.checkpoint.hf_stream import stream_hf_tensors
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.loader import SkippedSample
from megatron_vcr1.data.packing import Group
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.packed_batch import PackedBatch
from megatron_vcr1.parallel import collectives, mesh, schedule
from megatron_vcr1.rollout.build import build_engine
from megatron_vcr1.rollout.placement import Placement
from megatron_vcr1.training.grpo.objective import (
    Counts,
    TokenData,
    grpo_loss,
    mismatch,
    policy_statistics,
    token_weights,
)
from megatron_vcr1.training.grpo.rewarding import Rewarder
from megatron_vcr1.training.grpo.rollout_source import Ahead
from megatron_vcr1.training.grpo.scoring import Rollouts, ScoredGroup, StepGroups, all_positions, rollout_row
from megatron_vcr1.training.metrics import Metrics, add_work
from megatron_vcr1.training.microbatches import make_microbatches
from megatron_vcr1.training.optimizer import Learner, Loss, Update
from megatron_vcr1.training.prompts import DrawnPrompt, PromptStream
from megatron_vcr1.training.reference import Reference
from megatron_vcr1.training.trainer import StepResult
from megatron_vcr1.types import RolloutGroup


@dataclass(frozen=True, slots=True)
class PolicyBatch:
    """A microbatch of groups, and what the objective knows of its tokens."""

    packed: PackedBatch
    data: TokenData
    weights: Tensor  # [targets], of the tokens' losses


class GrpoTrainer:
    """Samples groups from the policy, rewards them, and makes what was better than its group more likely."""

    def __init__(
        self,
        config: RunConfig,
        learner: Learner,
        stream: PromptStream,
        processor: PromptProcessor,
        rewarder: Rewarder,
        num_steps: int,
    ) -> None:
        """The model holds the weights that training starts from: they are the reference.

        Raises:
            UserError: the engine cannot be had.
        """
        self._config = config
        self._settings = config.grpo
        self._learner = learner
        self._model = learner.model
        self._stream = stream
        self._num_steps = num_steps
        train = config.train
        self._num_prompts = math.ceil(train.num_epochs * stream.epoch_size) if train.num_steps is None else None
        self._num_used = 0  # prompts, of all copies of the model; without those under way
        self._policy_version = 0  # steps that the model's weights have seen
        self._reference = Reference(self._model, config.grpo.reference) if config.grpo.kl_coef > 0 else None
        self._engine = build_engine(config, self._model, processor)
        # Servers of the user's own may hold other weights; those of an imported model start without any.
        self._engine.update_weights(stream_hf_tensors(self._model), self._policy_version)
        self._rollouts = Rollouts(config, self._engine, stream, processor, rewarder)
        self._ahead = Ahead(self._engine, self._rollouts, stream) if config.grpo.one_step_off else None

    def step(self, step: int, metrics: Metrics) -> StepResult:
        """Responses to the next prompts; their advantages (equation 1); updates on the objective (equation 2)."""
        prompts, answers = self._sample(metrics)
        groups = self._rollouts.refill(self._rollouts.score(prompts, answers, metrics), metrics)
        self._num_used = self._stream.num_drawn
        if self._ahead is not None and step < self._num_steps and not self.is_out_of_data:
            self._sync_weights(self._policy_version, metrics)
            self._ahead.start(metrics)
        minibatches = self._minibatches(groups.kept)
        if self._reference is not None:
            with metrics.timed("reference"), self._reference.in_place():
                minibatches = [self._with_log_probs(batches, "ref_log_probs") for batches in minibatches]
        with metrics.timed("update"):
            if self._settings.epochs_per_rollout * len(minibatches) > 1:  # else the ratio is 1 and needs none
                minibatches = [self._with_log_probs(batches, "old_log_probs") for batches in minibatches]
            updates = [
                self._update(batches, metrics, first_pass=number == 0)
                for number in range(self._settings.epochs_per_rollout)
                for batches in minibatches
            ]
            learning_rate = self._learner.end_step()
        if self._ahead is None:
            self._sync_weights(step, metrics)
        return self._result(step, groups, updates, learning_rate, metrics)

    def _sample(self, metrics: Metrics) -> tuple[Sequence[DrawnPrompt], Sequence[RolloutGroup]]:
        """The step's prompts and the engine's answers: begun in the step before, or now."""
        if self._ahead is None or not self._ahead.is_under_way:
            prompts = self._rollouts.draw(metrics)
            return prompts, self._rollouts.sample(prompts, metrics)
        prompts, answers = self._ahead.finish(metrics)
        if any(collectives.gather_objects(answers is None)):  # all copies of the model hand weights over, or none
            self._sync_weights(self._policy_version, metrics)
        return prompts, self._rollouts.sample(prompts, metrics) if answers is None else answers

    def _sync_weights(self, version: int, metrics: Metrics) -> None:
        """The engine samples from the model's present weights from now on."""
        with metrics.timed("sync"):
            self._engine.update_weights(stream_hf_tensors(self._model), version)

    def _minibatches(self, groups: Sequence[ScoredGroup]) -> list[list[PolicyBatch]]:
        """The microbatches of each optimizer step of a pass over the groups.

        A minibatch is a share of the groups of all copies of the model in the order of their prompts, so that it does
        not depend on their number; one in which no copy has any is left out.
        """
        trainable = [group for group in groups if group.scored]
        positions = all_positions(trainable)
        number = self._settings.num_minibatches
        minibatch_of = {position: rank * number // len(positions) for rank, position in enumerate(positions)}
        shares: list[list[ScoredGroup]] = [[] for _ in range(number)]
        for group in trainable:
            shares[minibatch_of[group.prompt.position]].append(group)
        counts = _counts(shares)
        return [
            self._policy_batches(share, count)
            for share, count in zip(shares, counts, strict=True)
            if count.num_responses > 0
        ]

    def _policy_batches(self, groups: Sequence[ScoredGroup], counts: Counts) -> list[PolicyBatch]:
        by_id = {group.prompt.id: group for group in groups}
        packed = make_microbatches(
            [_training_group(group) for group in groups], self._model, self._config.train.microbatch_tokens
        )
        return [
            PolicyBatch(
                one.packed,
                token_data([by_id[group.id] for group in one.groups]).to(mesh.device()),
                token_weights(
                    one.packed.response_lengths,
                    counts,
                    self._settings.loss_normalization,
                    self._config.rollout.max_new_tokens,
                ).to(mesh.device()),
            )
            for one in packed
        ]

    def _with_log_probs(self, batches: list[PolicyBatch], name: str) -> list[PolicyBatch]:
        """The model's log-probs of all targets, as they are now, under a name of TokenData; on the last stage."""

        def collect(batch: PackedBatch, hidden: Tensor) -> Tensor:
            return self._model.log_probs(hidden, batch.target_ids, temperature=self._config.rollout.temperature)

        if not batches:
            return batches
        log_probs = schedule.forward_only(self._model, [one.packed for one in batches], collect)
        if not mesh.is_last_stage():
            return batches
        return [
            replace(batch, data=replace(batch.data, **{name: values}))
            for batch, values in zip(batches, log_probs, strict=True)
        ]

    def _update(self, batches: Sequence[PolicyBatch], metrics: Metrics, *, first_pass: bool) -> Update:
        """One optimizer step, and what its own forward pass tells."""
        update = self._learner.update([one.packed for one in batches], self._loss(batches))
        add_work(metrics, [one.packed for one in batches], self._model.model_config, self._config.model)
        if mesh.is_output_rank():
            for batch, statistics in zip(batches, update.metrics, strict=True):
                add_policy_metrics(metrics, statistics, batch.data, with_mismatch=first_pass)
        return update

    def _loss(self, batches: Sequence[PolicyBatch]) -> Loss:
        of_packed = {id(one.packed): one for one in batches}  # the schedule hands the packed batch back

        def loss(packed: PackedBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
            batch = of_packed[id(packed)]
            result = grpo_loss(
                self._model,
                hidden,
                packed,
                batch.data,
                batch.weights,
                self._settings,
                temperature=self._config.rollout.temperature,
            )
            return result.loss, policy_statistics(result)

        return loss

    def _result(
        self, step: int, groups: StepGroups, updates: Sequence[Update], learning_rate: float, metrics: Metrics
    ) -> StepResult:
        version, self._policy_version = self._policy_version, step
        if mesh.is_replica_leader():
            metrics.count("groups/dropped", len(groups.dropped))
            for group in groups.kept:
                metrics.add("policy_lag", version - group.rollouts[0].policy_version)
        metrics.high("policy_version", version)
        return StepResult(
            applied=all(update.applied for update in updates),
            loss=_mean([update.loss for update in updates]),
            grad_norm=_mean([update.grad_norm for update in updates]),
            learning_rate=learning_rate,
            samples=tuple(group.prompt.sample.id for group in groups.kept),
            rollouts=self._rows(step, groups) if mesh.is_replica_leader() else {},
        )

    def _rows(self, step: int, groups: StepGroups) -> dict[int, dict[str, Any]]:
        sources = self._config.data.sources
        return {
            group.prompt.position: rollout_row(
                step, group, thinking=sources[group.prompt.source].thinking, trained=kept and bool(group.scored)
            )
            for some, kept in ((groups.kept, True), (groups.dropped, False))
            for group in some
        }

    @property
    def is_out_of_data(self) -> bool:
        """With train.num_epochs: dynamic sampling takes more prompts than a step trains on, so the steps are fewer."""
        return self._num_prompts is not None and self._num_used >= self._num_prompts

    def take_skipped(self) -> list[SkippedSample]:
        return self._stream.take_skipped() if self._ahead is None else self._ahead.take_skipped()

    def state_dict(self) -> dict[str, Any]:
        """What is sampled ahead is not kept: a run that goes on samples it again, from the newer weights."""
        prompts = self._stream.state_dict() if self._ahead is None else self._ahead.stream_state()
        return {"prompts": prompts, "policy_version": self._policy_version}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The model holds the checkpoint's weights by now; the engine gets them."""
        self._stream.load_state_dict(state["prompts"])
        self._num_used = self._stream.num_drawn
        self._policy_version = state["policy_version"]
        self._engine.update_weights(stream_hf_tensors(self._model), self._policy_version)

    def close(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        self._stream.close()
        self._engine.close()


def check_settings(config: RunConfig) -> None:
    """Raises UserError for settings that exclude each other."""
    uses_servers = config.rollout.engine == "sglang"
    if config.grpo.one_step_off and uses_servers and not Placement.from_section(config.sglang).samples_while_training:
        raise UserError(
            "grpo.one_step_off samples while training computes, which colocated servers cannot: set "
            "sglang.colocated = false and give the servers GPUs of their own"
        )
    if config.grpo.overlong_buffer_tokens > config.rollout.max_new_tokens:
        raise UserError(
            f"grpo.overlong_buffer_tokens = {config.grpo.overlong_buffer_tokens} is longer than any response "
            f"(rollout.max_new_tokens = {config.rollout.max_new_tokens}), so all would be punished; lower it"
        )


def token_data(groups: Sequence[ScoredGroup]) -> TokenData:
    """What is known of the tokens of a microbatch's responses, in the order in which they are packed."""
    responses = [(group.rollouts[index], group.advantages[index]) for group in groups for index in group.scored]
    lengths = torch.tensor([len(rollout.token_ids) for rollout, _ in responses])
    return TokenData(
        advantages=torch.tensor([advantage for _, advantage in responses]).repeat_interleave(lengths),
        rollout_log_probs=torch.tensor([value for rollout, _ in responses for value in rollout.log_probs]),
        segment_ids=torch.arange(len(responses)).repeat_interleave(lengths),
    )


def add_policy_metrics(
    metrics: Metrics, statistics: Mapping[str, Tensor], data: TokenData, *, with_mismatch: bool
) -> None:
    """Take a microbatch's `policy_statistics` into a step's metrics."""
    log_probs = statistics["log_probs"]
    num_tokens = len(log_probs)
    names = ("kl", "entropy", "ratio/mean", "clip_fraction")
    for name, total in zip(names, statistics["sums"].tolist(), strict=True):
        if name != "kl" or data.ref_log_probs is not None:  # without a reference it is not 0, but unknown
            metrics.add(name, total, num_tokens)
    if with_mismatch:
        before = log_probs if data.old_log_probs is None else data.old_log_probs
        absolute, largest, kl = mismatch(before, data.rollout_log_probs)
        metrics.add("mismatch/mean_abs", absolute, num_tokens)
        metrics.high("mismatch/max_abs", largest)
        metrics.add("mismatch/kl", kl, num_tokens)


def _training_group(group: ScoredGroup) -> Group:
    """Without the responses that have no reward."""
    responses = tuple(torch.tensor(group.rollouts[index].token_ids) for index in group.scored)
    return Group(group.prompt.id, group.prompt.prompt, responses)


def _counts(shares: Sequence[Sequence[ScoredGroup]]) -> list[Counts]:
    """Responses and tokens of each minibatch over all copies of the model."""
    mine: list[float] = []
    for share in shares:
        lengths = [len(group.rollouts[index].token_ids) for group in share for index in group.scored]
        mine += [len(lengths), sum(lengths)]
    totals = collectives.sum_over_ranks(mine if mesh.is_replica_leader() else [0.0] * len(mine))
    return [Counts(*pair) for pair in zip(totals[::2], totals[1::2], strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
