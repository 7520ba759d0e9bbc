"""Training runs: builds everything from the settings and runs the training loop."""

from __future__ import annotations

import math
from contextlib import closing

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.checkpoint.run_store import RunStore
from megatron_vcr1.config.layout import check_layout
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.config.training_sections import TrainSection
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.qwen_vl import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.collectives import run_on_first_rank
from megatron_vcr1.rollout.build import build_engine, disable_nccl_cumem
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from megatron_vcr1.training.grpo.one_step_off import OneStepOffSource
from megatron_vcr1.training.grpo.rewarding import Rewarder, judge_for_samples
from megatron_vcr1.training.grpo.rollout_source import RolloutSource, SynchronousSource
from megatron_vcr1.training.grpo.scoring import GroupScorer
from megatron_vcr1.training.grpo.trainer import GrpoTrainer
from megatron_vcr1.training.lifecycle import Lifecycle
from megatron_vcr1.training.optimizer import Learner
from megatron_vcr1.training.profiling import StepProfile
from megatron_vcr1.training.prompts import PromptStream
from megatron_vcr1.training.reference import Reference
from megatron_vcr1.training.reporter import Reporter
from megatron_vcr1.training.run import Run
from megatron_vcr1.training.run_dir import RunDir
from megatron_vcr1.training.sft import SftTrainer
from megatron_vcr1.training.sinks import Sink, open_sinks
from megatron_vcr1.training.targets import check_thinking
from megatron_vcr1.training.trainer import Trainer
from megatron_vcr1.training.validation import check_batch_size, check_grpo_settings, check_warmup


def train(config: RunConfig) -> int:
    """Start a run, or resume it from its newest complete checkpoint. Every rank of the job calls this.

    Returns:
        0, or `lifecycle.EXIT_STOPPED_BY_SIGNAL` if a stop signal ended the run after a checkpoint.

    Raises:
        UserError: the settings, the model or the data are wrong.
        TrainingStopped: the run cannot continue sensibly.
    """
    model_config = ModelConfig.from_pretrained(config.model.path)
    check_layout(model_config.shape, config.parallel, config.recompute, mesh.launched_world_size())
    disable_nccl_cumem(config.rollout, config.sglang)
    # Longer than the watchdog's timeout: the watchdog must end a hung job first, because it reports where each rank is.
    timeout_s = config.train.step_timeout_s + mesh.COLLECTIVE_TIMEOUT_S
    with mesh.world(config.parallel, seed=config.train.seed, timeout_s=timeout_s):
        return train_in_world(config, model_config)


def train_in_world(config: RunConfig, model_config: ModelConfig) -> int:
    """Train in a process that has called parallel.mesh.initialize already; `train` initializes the mesh itself."""
    # The run directory is opened first: if another process trains in it, or it cannot be written to, the user should
    # learn that before servers are started.
    run_dir = RunDir(config.train.run_dir)
    run_on_first_rank(run_dir.create)
    store = RunStore(run_dir.checkpoints, config.checkpoint)
    learner, trainer, num_steps = build(config, model_config)
    with closing(trainer):
        if config.train.stage == "grpo" and config.grpo.kl_coef > 0:
            store.pin_reference(learner.model)  # before Run resumes: the model still has the weights of model.path
        profile = StepProfile(config.profile, run_dir.profile)
        run = Run(
            config.train,
            config.checkpoint,
            config.model.path,
            run_dir=run_dir,
            store=store,
            learner=learner,
            trainer=trainer,
            num_steps=num_steps,
        )

        def open_outputs() -> list[Sink]:
            run_dir.open(config, run.step)
            settings = config.model_dump(mode="json")
            return open_sinks(config.logging, run_dir.path, settings, first_step=run.step, num_steps=num_steps)

        lifecycle = Lifecycle(step_timeout_s=config.train.step_timeout_s, finish_saving=store.finish)
        reporter = Reporter(run_dir, open_outputs, mismatch_threshold=config.logging.mismatch_threshold)
        with lifecycle, closing(profile), reporter:
            return run.run(lifecycle, reporter, profile)


def build(config: RunConfig, model_config: ModelConfig) -> tuple[Learner, Trainer, int]:
    """Build the learner with the weights of model.path, the trainer, and the run's number of steps.

    Everything that can be wrong with the settings and the data is checked before the model is loaded, because loading a
    large model takes minutes.

    Raises:
        UserError: the settings, the model or the data are wrong.
    """
    check_batch_size(config.train, config.grpo, mesh.num_replicas())
    processor = PromptProcessor.from_pretrained(config.model.path, model_config)
    stream = PromptStream(config.data, processor, seed=config.train.seed)
    num_steps = config.train.num_steps or steps_of_epochs(config.train, stream.epoch_size)
    check_warmup(config.optimizer, num_steps)
    if config.train.stage == "sft":
        check_thinking(config.data.sources, stream.samples)
        learner = _build_learner(config, model_config, num_steps)
        trainer = SftTrainer(
            learner,
            stream,
            processor,
            data_sources=config.data.sources,
            frozen_parts=config.model.freeze,
            train=config.train,
        )
        return learner, trainer, num_steps
    check_grpo_settings(config.grpo, config.rollout, config.sglang)
    tokens = SpecialTokens.from_pretrained(config.model.path, processor, model_config.num_embeddings)
    scorer = _build_scorer(config, stream, processor)
    learner = _build_learner(config, model_config, num_steps)
    return learner, _build_grpo_trainer(config, learner, stream, processor, tokens, scorer, num_steps), num_steps


def _build_learner(config: RunConfig, model_config: ModelConfig, num_steps: int) -> Learner:
    model = build_model(model_config, config.model, config.parallel, config.recompute).to(mesh.device())
    load_model_weights(model, config.model.path)
    return Learner(model, config.optimizer, num_steps)


def _build_scorer(config: RunConfig, stream: PromptStream, processor: PromptProcessor) -> GroupScorer:
    rewarder = Rewarder(
        config.data.sources,
        judge_for_samples(config.judge, stream.samples, config.train.run_dir / "judge_cache"),
        overlong_buffer_tokens=config.grpo.overlong_buffer_tokens,
        max_new_tokens=config.rollout.max_new_tokens,
    )
    return GroupScorer(rewarder, processor, config.judge, divide_by_std=config.grpo.divide_by_std)


def _build_grpo_trainer(
    config: RunConfig,
    learner: Learner,
    stream: PromptStream,
    processor: PromptProcessor,
    tokens: SpecialTokens,
    scorer: GroupScorer,
    num_steps: int,
) -> GrpoTrainer:
    """Build the GRPO trainer and start its engine. The model must hold the weights that training starts from."""
    train, grpo, rollout = config.train, config.grpo, config.rollout
    reference = Reference(learner.model, grpo.reference) if grpo.kl_coef > 0 else None
    engine = build_engine(config, learner.model, processor, tokens)
    source: RolloutSource
    if grpo.one_step_off:
        source = OneStepOffSource(
            engine, learner.model, stream, scorer, train=train, grpo=grpo, rollout=rollout, num_steps=num_steps
        )
    else:
        source = SynchronousSource(engine, learner.model, stream, scorer, train=train, grpo=grpo, rollout=rollout)
    return GrpoTrainer(
        learner,
        source,
        reference,
        data_sources=config.data.sources,
        frozen_parts=config.model.freeze,
        train=train,
        grpo=grpo,
        rollout=rollout,
    )


def steps_of_epochs(section: TrainSection, epoch_size: int) -> int:
    """Return the number of steps in train.num_epochs; the last step may reach into the next epoch."""
    return max(1, math.ceil(section.num_epochs * epoch_size / section.prompts_per_step))
