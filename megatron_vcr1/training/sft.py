"""Supervised fine-tuning on the right answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.loader import SkippedSample
from megatron_vcr1.data.packing import Group
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.model.packed_batch import PackedBatch
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.training.metrics import Metrics, add_work
from megatron_vcr1.training.microbatches import make_microbatches
from megatron_vcr1.training.optimizer import Learner, Loss
from megatron_vcr1.training.prompts import DrawnPrompt, PromptStream
from megatron_vcr1.training.targets import TargetEncoder, completion_text
from megatron_vcr1.training.trainer import StepResult


class SftTrainer:
    """The loss is the answers' negative log-likelihood, a mean over the target tokens of all copies of the model."""

    def __init__(self, config: RunConfig, learner: Learner, stream: PromptStream, processor: PromptProcessor) -> None:
        """Raises UserError if the chat template cannot close an assistant's turn."""
        self._config = config
        self._learner = learner
        self._stream = stream
        self._targets = TargetEncoder(processor)

    def step(self, step: int, metrics: Metrics) -> StepResult:
        """Take the next prompts, and one optimizer step on their answers."""
        with metrics.timed("decode"):
            prompts = self._stream.take(self._config.train.prompts_per_step // mesh.num_replicas())
        with metrics.timed("update"):
            groups = [Group(one.id, one.prompt, (self._answer(one),)) for one in prompts]
            microbatches = make_microbatches(groups, self._learner.model, self._config.train.microbatch_tokens)
            batches = [one.packed for one in microbatches]
            lengths = [len(group.responses[0]) for group in groups]
            (num_tokens,) = collectives.sum_over_ranks([sum(lengths) if mesh.is_replica_leader() else 0])
            update = self._learner.update(batches, self._loss(num_tokens))
        add_work(metrics, batches, self._learner.model.model_config, self._config.model)
        if mesh.is_replica_leader():
            metrics.add("response_tokens/mean", sum(lengths), len(lengths))
            metrics.high("response_tokens/max", max(lengths))
            metrics.count("downscaled_videos", sum(one.reduction is not None for one in prompts))
        learning_rate = self._learner.end_step()
        ids = tuple(one.sample.id for one in prompts)
        return StepResult(update.applied, update.loss, update.grad_norm, learning_rate, ids)

    def _answer(self, prompt: DrawnPrompt) -> Tensor:
        thinking = self._config.data.sources[prompt.source].thinking
        return self._targets.encode(completion_text(prompt.sample, self._stream.templates, thinking=thinking))

    def _loss(self, num_tokens: float) -> Loss:
        model = self._learner.model

        def loss(batch: PackedBatch, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
            return -model.log_probs(hidden, batch.target_ids).sum() / num_tokens, {}

        return loss

    @property
    def is_out_of_data(self) -> bool:
        return False  # each step takes equally many prompts

    def take_skipped(self) -> list[SkippedSample]:
        return self._stream.take_skipped()

    def state_dict(self) -> dict[str, Any]:
        return {"prompts": self._stream.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._stream.load_state_dict(state["prompts"])

    def close(self) -> None:
        self._stream.close()
