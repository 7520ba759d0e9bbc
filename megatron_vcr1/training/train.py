"""A training run, from its settings to its last checkpoint."""

from __future__ import annotations

import math
from contextlib import closing

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.checkpoint.run_store import RunStore
from megatron_vcr1.config.layout import check_layout
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.processor import read_processor
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.qwen_vl import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.collectives import run_on_first_rank
from megatron_vcr1.rollout.build import disable_nccl_cumem
from megatron_vcr1.training.grpo.rewarding import Rewarder
from megatron_vcr1.training.grpo.trainer import GrpoTrainer, check_settings
from megatron_vcr1.training.optimizer import Learner
from megatron_vcr1.training.prompts import PromptStream
from megatron_vcr1.training.run import Run
from megatron_vcr1.training.run_dir import RunDir
from megatron_vcr1.training.sft import SftTrainer
from megatron_vcr1.training.targets import check_thinking
from megatron_vcr1.training.trainer import Trainer


def train(config: RunConfig) -> int:
    """Run it, or go on with it from its newest whole checkpoint; every rank of the job calls this.

    Returns:
        0, or `loop.EXIT_STOPPED_BY_SIGNAL` if a signal ended it early, behind a checkpoint.

    Raises:
        UserError: the settings, the model or the data are at fault.
        TrainingStopped: the run cannot go on in earnest.
    """
    shape = ModelConfig.from_pretrained(config.model.path).shape
    check_layout(shape, config.parallel, config.recompute, mesh.launched_world_size())
    disable_nccl_cumem(config.rollout, config.sglang)
    # The step's own clock runs out first: it tells where every rank is.
    timeout_s = config.train.step_timeout_s + mesh.COLLECTIVE_TIMEOUT_S
    with mesh.world(config.parallel, seed=config.train.seed, timeout_s=timeout_s):
        return train_in_world(config)


def train_in_world(config: RunConfig) -> int:
    """`train` within parallel.mesh.initialize."""
    # First: a folder that another process trains in, or that cannot be written to, is told before servers start in it.
    folder = RunDir(config.train.run_dir)
    run_on_first_rank(folder.create)
    store = RunStore(folder.checkpoints, config.checkpoint)
    learner, trainer, num_steps = build(config)
    with closing(trainer), Run(config, folder, store, learner, trainer, num_steps) as run:
        return run.run_steps()


def build(config: RunConfig) -> tuple[Learner, Trainer, int]:
    """What learns, with the weights of model.path; what teaches it; and the run's number of steps.

    Raises:
        UserError: the settings, the model or the data are at fault.
    """
    check_batch(config, mesh.num_replicas())
    processor = read_processor(config.model.path)
    stream = PromptStream(config.data, processor, seed=config.train.seed)
    num_steps = config.train.num_steps or steps_of_epochs(config, stream.epoch_size)
    check_warmup(config, num_steps)
    if config.train.stage == "sft":
        check_thinking(config.data.sources, stream.samples)
        learner = _learner(config, num_steps)
        return learner, SftTrainer(config, learner, stream, processor), num_steps
    check_settings(config)
    rewarder = Rewarder(config, stream.samples, config.train.run_dir)
    learner = _learner(config, num_steps)  # a large model takes minutes to load: the user's mistakes come before
    return learner, GrpoTrainer(config, learner, stream, processor, rewarder, num_steps), num_steps


def _learner(config: RunConfig, num_steps: int) -> Learner:
    model = build_model(ModelConfig.from_pretrained(config.model.path), config).to(mesh.device())
    load_model_weights(model, config.model.path)
    return Learner(model, config.optimizer, num_steps)


def check_batch(config: RunConfig, num_replicas: int) -> None:
    """Raises UserError if a step's prompts do not divide among the copies of the model, or into minibatches."""
    number = config.train.prompts_per_step
    if number % num_replicas:
        raise UserError(
            f"train.prompts_per_step = {number} does not divide among {num_replicas} copies of the model; make it a "
            f"multiple of {num_replicas}"
        )
    if config.train.stage == "grpo" and number % config.grpo.num_minibatches:
        raise UserError(
            f"train.prompts_per_step = {number} does not divide into grpo.num_minibatches = "
            f"{config.grpo.num_minibatches}; make it a multiple of that"
        )


def check_warmup(config: RunConfig, num_steps: int) -> None:
    """Raises UserError if the warm-up is longer than the run."""
    if config.optimizer.warmup_steps >= num_steps:
        raise UserError(
            f"optimizer.warmup_steps = {config.optimizer.warmup_steps} must be below the run's {num_steps} steps"
        )


def steps_of_epochs(config: RunConfig, epoch_size: int) -> int:
    """Steps that train.num_epochs take; the last one may reach into the next epoch."""
    return max(1, math.ceil(config.train.num_epochs * epoch_size / config.train.prompts_per_step))
