"""Training runs: builds everything from the settings and runs the training loop."""

from __future__ import annotations

import logging
from contextlib import closing

import torch.distributed as dist

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.checkpoint.run_store import RunStore
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.shared_memory import warn_if_shared_memory_is_small
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.collectives import run_on_first_rank
from megatron_vcr1.rollout.build import build_engine, disable_nccl_cumem
from megatron_vcr1.rollout.engine import RolloutEngine
from megatron_vcr1.training.environment import use_deterministic_algorithms
from megatron_vcr1.training.grpo.one_step_off import OneStepOffSource
from megatron_vcr1.training.grpo.rollout_source import RolloutSource, SynchronousSource
from megatron_vcr1.training.grpo.trainer import GrpoTrainer
from megatron_vcr1.training.inputs import RunInputs, read_inputs, read_model_config
from megatron_vcr1.training.lifecycle import Lifecycle
from megatron_vcr1.training.metrics import device_name
from megatron_vcr1.training.optimizer import Learner
from megatron_vcr1.training.profiling import StepProfile
from megatron_vcr1.training.reference import Reference
from megatron_vcr1.training.reporter import Reporter
from megatron_vcr1.training.run import Run
from megatron_vcr1.training.run_dir import RunDir
from megatron_vcr1.training.settings_checks import ignored_epochs
from megatron_vcr1.training.sft import SftTrainer
from megatron_vcr1.training.sinks import Sink, open_sinks
from megatron_vcr1.training.trainer import Trainer

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> int:
    """Start a run, or resume it from its newest complete checkpoint. Every rank of the job calls this.

    Returns:
        0, or `lifecycle.EXIT_STOPPED_BY_SIGNAL` if a stop signal ended the run, after a checkpoint of the
        last step.

    Raises:
        UserError: the settings, the model or the data are wrong.
        TrainingStopped: the run cannot continue sensibly.
    """
    model_config = read_model_config(config, mesh.launched_world_size())
    if config.train.deterministic:
        use_deterministic_algorithms()
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
    logger.info("ranks: %d, device: %s", dist.get_world_size(), device_name() or "CPU (torch finds no GPU)")
    logger.info("reading %d manifests", len(config.data.sources))
    inputs = read_inputs_of_rank(config, model_config)
    if ignored := ignored_epochs(config.train):
        logger.warning(ignored)
    learner, trainer = build(config, inputs)
    num_steps = inputs.num_steps
    with closing(trainer):
        if config.train.stage == "grpo" and config.grpo.kl_coef > 0:
            store.pin_reference(learner.model)  # before Run resumes: the model still has the weights of model.path
        profile = StepProfile(config.profile, run_dir.profile)
        run = Run(
            config.train,
            config.checkpoint,
            config.validation,
            config.model.path,
            run_dir=run_dir,
            store=store,
            learner=learner,
            trainer=trainer,
            validator=inputs.validator,
            num_steps=num_steps,
        )

        def open_outputs() -> list[Sink]:
            run_dir.open(config, run.step, run.validated_step, num_steps=num_steps)
            settings = config.model_dump(mode="json")
            return open_sinks(config.logging, run_dir.path, settings, first_step=run.step, num_steps=num_steps)

        lifecycle = Lifecycle(step_timeout_s=config.train.step_timeout_s, finish_saving=store.finish)
        reporter = Reporter(run_dir, open_outputs, mismatch_threshold=config.logging.mismatch_threshold)
        with lifecycle, closing(profile), reporter:
            return run.run(lifecycle, reporter, profile)


def read_inputs_of_rank(config: RunConfig, model_config: ModelConfig) -> RunInputs:
    """Call `read_inputs` for this rank of the running job."""
    inputs = read_inputs(config, model_config, num_ranks=dist.get_world_size(), replica_index=mesh.replica_index())
    if mesh.is_first_rank_on_host():
        warn_if_shared_memory_is_small(config.data, inputs.processor, num_readers=mesh.num_leaders_on_host())
    return inputs


def build(config: RunConfig, inputs: RunInputs) -> tuple[Learner, Trainer]:
    """Load the model of model.path, which takes minutes if it is large, and build its trainer and engine.

    Raises:
        UserError: a setting of the servers cannot work.
        EngineError: a server does not start.
    """
    logger.info("loading %s", config.model.path)
    model = build_model(inputs.model_config, config.model, config.parallel, config.recompute).to(mesh.device())
    load_model_weights(model, config.model.path)
    learner = Learner(model, config.optimizer, inputs.num_steps)
    if config.train.stage == "grpo":
        return learner, _build_grpo_trainer(config, learner, inputs)
    needs_engine = inputs.validator is not None
    trainer = SftTrainer(
        learner,
        inputs.stream,
        inputs.processor,
        _start_engine(config, learner, inputs) if needs_engine else None,
        releases_gradients=_has_colocated_servers(config),
        data_sources=config.data.sources,
        frozen_parts=config.model.freeze,
        recompute=config.recompute,
        train=config.train,
    )
    return learner, trainer


def _has_colocated_servers(config: RunConfig) -> bool:
    return config.rollout.engine == "sglang" and config.sglang.colocated


def _start_engine(config: RunConfig, learner: Learner, inputs: RunInputs) -> RolloutEngine:
    if _has_colocated_servers(config):
        learner.release_gradients()  # servers size their KV cache by the memory that is free when they start
    if config.rollout.engine == "sglang":
        logger.info("starting SGLang servers; their logs are in %s", config.train.run_dir / "sglang" / "logs")
    return build_engine(config, learner.model, inputs.processor, inputs.tokens)


def _build_grpo_trainer(config: RunConfig, learner: Learner, inputs: RunInputs) -> GrpoTrainer:
    """Build the GRPO trainer and start its engine. The model must hold the weights that training starts from."""
    train, grpo, rollout = config.train, config.grpo, config.rollout
    stream, scorer = inputs.stream, inputs.scorer
    assert scorer is not None
    reference = Reference(learner.ddp_model, grpo.reference) if grpo.kl_coef > 0 else None
    engine = _start_engine(config, learner, inputs)
    source: RolloutSource
    if grpo.one_step_off:
        source = OneStepOffSource(
            engine, learner.model, stream, scorer, train=train, grpo=grpo, rollout=rollout, num_steps=inputs.num_steps
        )
    else:
        source = SynchronousSource(engine, learner.model, stream, scorer, train=train, grpo=grpo, rollout=rollout)
    return GrpoTrainer(
        learner,
        source,
        reference,
        releases_gradients=_has_colocated_servers(config),
        data_sources=config.data.sources,
        frozen_parts=config.model.freeze,
        recompute=config.recompute,
        train=train,
        grpo=grpo,
        rollout=rollout,
    )
