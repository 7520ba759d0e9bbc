"""Reads the inputs of a run before its model is loaded, and checks settings against the model and the data.

`vcr1 train` and `vcr1 config --check` call the same functions, so that they refuse the same settings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from megatron_vcr1.config.layout import check_batch_size, check_layout
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.config.training_sections import TrainSection
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.mrope import check_prompt
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from megatron_vcr1.tasks import load_tasks
from megatron_vcr1.training.grpo.rewarding import Rewarder, check_weights, judge_for_samples
from megatron_vcr1.training.grpo.scoring import GroupScorer
from megatron_vcr1.training.prompts import PromptStream
from megatron_vcr1.training.settings_checks import (
    check_grpo_settings,
    check_profile_ranks,
    check_validation,
    check_warmup,
)
from megatron_vcr1.training.targets import check_thinking
from megatron_vcr1.training.validation import Validator, check_keep_best


@dataclass(frozen=True, slots=True)
class RunInputs:
    """The checked inputs of a run.

    Attributes:
        num_steps: length of the run.
        scorer: scores responses; None for SFT.
        validator: None without validation.
    """

    model_config: ModelConfig
    processor: PromptProcessor
    tokens: SpecialTokens
    stream: PromptStream
    num_steps: int
    scorer: GroupScorer | None
    validator: Validator | None


def read_model_config(config: RunConfig, num_ranks: int) -> ModelConfig:
    """Read the model's configuration and check that the layout is possible for a job of `num_ranks` ranks.

    Raises:
        UserError: the model directory or the layout is invalid.
    """
    model_config = ModelConfig.from_pretrained(config.model.path)
    check_layout(model_config.shape, config.parallel, config.recompute, num_ranks)
    return model_config


def read_inputs(config: RunConfig, model_config: ModelConfig, *, num_ranks: int, replica_index: int = 0) -> RunInputs:
    """Read tokenizer, manifests and rewards, and check everything that can be wrong with settings and data.

    It needs no process group: `num_ranks` may be that of a job that will run elsewhere. Videos are not opened.

    Args:
        num_ranks: number of ranks of the job; `read_model_config` has checked the layout.
        replica_index: index of this rank's replica.

    Raises:
        UserError: the settings, the model's files or the data are wrong.
    """
    num_replicas = num_ranks // config.parallel.ranks_per_replica
    check_batch_size(config.train, config.grpo, num_replicas)
    check_profile_ranks(config.profile, num_ranks)
    load_tasks(config.data.tasks, config.data.python_path)
    check_validation(config.validation, config.checkpoint)
    if config.train.stage == "grpo":
        check_grpo_settings(config.grpo, config.rollout, config.sglang)
    processor = PromptProcessor.from_pretrained(config.model.path, model_config)
    check = partial(check_prompt, config=model_config, num_new_tokens=config.rollout.max_new_tokens - 1)
    stream = PromptStream(
        config.data,
        processor,
        seed=config.train.seed,
        check_prompt=check if config.train.stage == "grpo" else None,
        config_of_targets=model_config if config.train.stage == "sft" else None,
        replica_index=replica_index,
        num_replicas=num_replicas,
    )
    num_steps = config.train.num_steps or steps_of_epochs(config.train, stream.epoch_size)
    check_warmup(config.optimizer, num_steps)
    if config.train.stage == "sft":
        check_thinking(config.data.sources, stream.samples)
    return RunInputs(
        model_config=model_config,
        processor=processor,
        tokens=SpecialTokens.from_pretrained(config.model.path, processor, model_config.num_embeddings),
        stream=stream,
        num_steps=num_steps,
        scorer=_build_scorer(config, stream, processor) if config.train.stage == "grpo" else None,
        validator=_build_validator(config, model_config, processor),
    )


def _build_scorer(config: RunConfig, stream: PromptStream, processor: PromptProcessor) -> GroupScorer:
    check_weights(config.rewards, config.data.sources, stream.samples)
    rewarder = Rewarder(
        config.data.sources,
        judge_for_samples(config.judge, stream.samples, config.train.run_dir / "judge_cache"),
        weights=config.rewards.weights,
        overlong_buffer_tokens=config.grpo.overlong_buffer_tokens,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    return GroupScorer(rewarder, processor, config.judge, divide_by_std=config.grpo.divide_by_std)


def _build_validator(config: RunConfig, model_config: ModelConfig, processor: PromptProcessor) -> Validator | None:
    if not config.validation.benchmarks:
        return None
    validator = Validator(
        config.validation,
        config.data,
        config.judge,
        processor,
        check_prompt=partial(check_prompt, config=model_config),
        run_dir=config.train.run_dir,
    )
    if config.checkpoint.keep_best is not None:
        check_keep_best(config.checkpoint.keep_best, validator.metric_names)
    return validator


def steps_of_epochs(section: TrainSection, epoch_size: int) -> int:
    """Return the number of steps in train.num_epochs; the last step may reach into the next epoch."""
    return max(1, math.ceil(section.num_epochs * epoch_size / section.prompts_per_step))
