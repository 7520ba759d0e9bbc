"""Supervised fine-tuning on the samples' target texts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from megatron_vcr1.checkpoint.hf_stream import stream_hf_tensors
from megatron_vcr1.config.data_sections import DataSource
from megatron_vcr1.config.model_sections import RecomputeSection
from megatron_vcr1.config.training_sections import TrainSection
from megatron_vcr1.data.loader import SkippedSample
from megatron_vcr1.data.packing import Group
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.rollout.engine import RolloutEngine, SamplingParams
from megatron_vcr1.training.metrics import Metrics, add_update_work
from megatron_vcr1.training.microbatches import Microbatch, pack_microbatches
from megatron_vcr1.training.optimizer import Learner
from megatron_vcr1.training.prompts import DrawnPrompt, PromptStream
from megatron_vcr1.training.targets import TargetEncoder, completion_text
from megatron_vcr1.training.trainer import StepResult


class SftTrainer:
    """Minimizes the negative log-likelihood of the targets, averaged over the target tokens of all replicas."""

    def __init__(
        self,
        learner: Learner,
        stream: PromptStream,
        processor: PromptProcessor,
        engine: RolloutEngine | None,
        *,
        releases_gradients: bool,
        data_sources: Sequence[DataSource],
        frozen_parts: Collection[str],
        recompute: RecomputeSection,
        train: TrainSection,
    ) -> None:
        """
        Args:
            engine: generates responses in validation; the trainer closes it. None without validation.
            releases_gradients: whether the gradient buffers' memory is free while the engine generates, as for
                `GrpoTrainer`.
            data_sources: data.sources; each says whether its prompts ask for reasoning.
            frozen_parts: model.freeze, for the FLOPs of an update, like recompute.

        Raises:
            UserError: the chat template cannot close an assistant's turn.
        """
        self._learner = learner
        self._stream = stream
        self._engine = engine
        self._releases_gradients = releases_gradients
        self._num_syncs = 0
        self._targets = TargetEncoder(processor)
        self._data_sources = data_sources
        self._frozen_parts = frozen_parts
        self._recompute = recompute
        self._train = train
        if engine is not None:
            # Colocated servers have their memory from their start on, and the first validation may be many steps away.
            engine.generate([], SamplingParams(max_new_tokens=1))

    def step(self, step: int, metrics: Metrics) -> StepResult:
        """Draw the next prompts and do one optimizer step on their targets."""
        with metrics.time_phase("decode"):
            prompts = self._stream.take(self._train.prompts_per_step // mesh.num_replicas())
        self._learner.restore_gradients()
        with metrics.time_phase("update", wait_for_device=True):
            groups = [Group(prompt.id, prompt.prompt, (self._target(prompt),)) for prompt in prompts]
            packed = pack_microbatches(groups, self._learner.model, self._train.microbatch_tokens)
            batches = [Microbatch(sequence) for _, sequence in packed]
            lengths = [len(group.responses[0]) for group in groups]
            # The ranks of a replica have the same targets: only its leader counts them.
            (num_tokens,) = collectives.sum_over_ranks([sum(lengths) if mesh.is_replica_leader() else 0])

            def loss(batch: Microbatch, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
                return -self._learner.model.log_probs(hidden, batch.packed.target_ids).sum() / num_tokens, {}

            update = self._learner.update(batches, loss)
        add_update_work(
            metrics,
            batches,
            self._learner.model.model_config,
            frozen_parts=self._frozen_parts,
            recompute=self._recompute,
        )
        if mesh.is_replica_leader():
            metrics.add_to_mean("response_tokens/mean", sum(lengths), len(lengths))
            metrics.update_max("response_tokens/max", max(lengths))
            metrics.add_to_sum("downscaled_videos", sum(prompt.reduction is not None for prompt in prompts))
        return StepResult(
            update.applied,
            update.loss,
            update.grad_norm,
            learning_rate=self._learner.end_step(),
            samples=tuple(prompt.sample.id for prompt in prompts),
        )

    def _target(self, prompt: DrawnPrompt) -> Tensor:
        thinking = self._data_sources[prompt.source].thinking
        return self._targets.encode(completion_text(prompt.sample, self._stream.templates, thinking=thinking))

    def engine_with_policy(self) -> RolloutEngine:
        assert self._engine is not None, "the run has no validation"
        self._learner.wait_for_parameters()
        if self._releases_gradients:
            self._learner.release_gradients()
        self._num_syncs += 1  # an engine needs another version for other weights
        self._engine.update_weights(stream_hf_tensors(self._learner.model), self._num_syncs)
        return self._engine

    @property
    def is_out_of_data(self) -> bool:
        return False  # every step uses the same number of prompts, so the number of steps covers the epochs

    def take_skipped(self) -> list[SkippedSample]:
        return self._stream.take_skipped()

    def state_dict(self) -> dict[str, Any]:
        return {"prompts": self._stream.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._stream.load_state_dict(state["prompts"])

    def close(self) -> None:
        self._stream.close()
        if self._engine is not None:
            self._engine.close()
