"""Checks a run's settings for a job of any size, without GPUs: `vcr1 config --check CONFIG --ranks N`.

It calls the functions that `vcr1 train` calls before it loads the model, and adds what a run would only find out later:
samples that cannot be read, too little memory, a full disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from megatron_vcr1.checkpoint.step_dirs import saved_steps, step_dir
from megatron_vcr1.checkpoint.training_state import read_state
from megatron_vcr1.config.layout import check_batch_size
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.loader import PrepareFn
from megatron_vcr1.data.prompts import PromptTooLongError
from megatron_vcr1.data.video_types import VideoError
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.planning.devices import Cluster
from megatron_vcr1.planning.job import Job
from megatron_vcr1.planning.memory import checkpoint_bytes, host_memory, training_memory
from megatron_vcr1.planning.run_job import job_of_run, layout_of_run
from megatron_vcr1.rollout.placement import Placement
from megatron_vcr1.rollout.sglang.launch import check_server_args, require_sglang
from megatron_vcr1.training.inputs import RunInputs, read_inputs, read_model_config
from megatron_vcr1.training.run_dir import RunDir
from megatron_vcr1.training.settings_checks import check_stage, ignored_epochs
from megatron_vcr1.types import Sample

NUM_SAMPLES = 2  # that are decoded of each source
RESPONSE_TOKENS = 200  # mean that the memory estimate assumes


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the table.

    Attributes:
        status: "ok", "warning" (`vcr1 train` starts, but may fail later) or "error" (`vcr1 train` refuses it, or cannot
            write its first checkpoint).
    """

    subject: str
    status: str
    text: str


def check_config(config: RunConfig, cluster: Cluster) -> list[Finding]:
    """Check a configuration for a job and return what was found, in the order of the table."""
    findings: list[Finding] = []

    def check(subject: str, function: Callable[[], tuple[str, str]]) -> None:
        try:
            findings.append(Finding(subject, *function()))
        except UserError as error:
            if not any(finding.text == str(error) for finding in findings):  # two checks may call the same function
                findings.append(Finding(subject, "error", str(error)))

    model: ModelConfig | None = None
    with suppress(UserError):  # the first check reports it
        model = read_model_config(config, cluster.num_gpus)
    check("model, layout", lambda: _layout(config, cluster))
    if model is not None:
        inputs: list[RunInputs] = []
        job = _job(config, model)
        check("batch", lambda: _batch(config, cluster, job))
        check("settings, data", lambda: _inputs(config, model, cluster, inputs))
        if inputs:
            check("first samples", lambda: _first_samples(config, inputs[0]))
        check("memory", lambda: _memory(config, cluster, job))
        check("checkpoints", lambda: _checkpoints(config, job))
    check("servers", lambda: _servers(config, cluster))
    check("run directory", lambda: _run_dir(config))
    return findings


def _layout(config: RunConfig, cluster: Cluster) -> tuple[str, str]:
    model, parallel = read_model_config(config, cluster.num_gpus), config.parallel
    replicas = cluster.num_gpus // parallel.ranks_per_replica
    text = f"{model.family.title}, {model.text.num_layers} layers; tensor {parallel.tensor} x "
    text += f"context {parallel.context} x " if parallel.context > 1 else ""
    text += f"pipeline {parallel.pipeline} x {replicas} replicas"
    slow = f"groups cross nodes of {cluster.device.gpus_per_node} GPUs, which is slow"
    if _crosses_nodes(parallel.tensor, cluster):
        return "warning", f"{text}: tensor-parallel {slow}"
    if parallel.context > 1 and _crosses_nodes(parallel.tensor * parallel.context, cluster):
        return "warning", f"{text}: context-parallel {slow}"
    return "ok", text


def _crosses_nodes(num_ranks: int, cluster: Cluster) -> bool:
    """Return whether some groups of `num_ranks` successive ranks have GPUs of several nodes."""
    per_node = cluster.device.gpus_per_node
    return num_ranks > per_node or per_node % num_ranks > 0


def _job(config: RunConfig, model: ModelConfig) -> Job:
    # The number of samples matters for the time of a run only, which is not estimated here.
    tokens = min(RESPONSE_TOKENS, config.rollout.max_new_tokens)
    return job_of_run(config, model, response_tokens=tokens, num_samples=1)


def _batch(config: RunConfig, cluster: Cluster, job: Job) -> tuple[str, str]:
    replicas = cluster.num_gpus // config.parallel.ranks_per_replica
    check_batch_size(config.train, config.grpo, replicas)
    layout = layout_of_run(config, job, cluster.num_gpus)
    per_replica = config.train.prompts_per_step // replicas
    text = f"{config.train.prompts_per_step} prompts per step, {per_replica} per replica in about "
    text += f"{layout.num_microbatches(job)} microbatches"
    text += " per optimizer step" if job.num_minibatches > 1 else ""
    if config.train.microbatch_tokens < job.group_tokens:
        return "ok", f"{text}; a group of {job.group_tokens:,} tokens is longer than train.microbatch_tokens"
    return "ok", text


def _inputs(config: RunConfig, model: ModelConfig, cluster: Cluster, found: list[RunInputs]) -> tuple[str, str]:
    inputs = read_inputs(config, model, num_ranks=cluster.num_gpus)
    found.append(inputs)
    samples = sum(map(len, inputs.stream.samples))
    text = f"{samples:,} samples of {len(inputs.stream.samples)} sources; {inputs.num_steps:,} steps"
    if inputs.validator is not None:
        text += f"; validation of {', '.join(inputs.validator.metric_names)}"
    if config.logging.wandb_project is not None and find_spec("wandb") is None:
        raise UserError("logging.wandb_project is set, but wandb cannot be imported: pip install wandb")
    if ignored := ignored_epochs(config.train):
        return "warning", f"{text}; {ignored}"
    return "ok", text


def _first_samples(config: RunConfig, inputs: RunInputs) -> tuple[str, str]:
    """Decode and encode the first samples of each source as a run does, in a subprocess that may crash."""
    # In a subprocess, as in a decoding worker; a GPU decoder is not needed to know whether a file can be read.
    backend = "auto" if config.data.backend == "dali-gpu" else config.data.backend
    data = config.data.model_copy(update={"num_workers": 1, "backend": backend})
    sources = inputs.stream.sources(data)
    if inputs.validator is not None:
        sources += inputs.validator.sources(data)
    outcomes = [outcome for function, samples in sources for outcome in _prepare(function, samples)]
    lengths = [outcome for outcome in outcomes if isinstance(outcome, int)]
    problems = [outcome for outcome in outcomes if isinstance(outcome, str)]
    limit = f"data.max_prompt_tokens = {config.data.max_prompt_tokens:,}"
    text = f"{len(lengths)} of {len(outcomes)} read and encoded"
    if lengths:
        text += f": {min(lengths):,} to {max(lengths):,} tokens ({limit})"
    return ("warning" if problems else "ok"), "; ".join([text, *problems])


def _prepare(function: PrepareFn, samples: Sequence[Sample]) -> Iterator[int | str]:
    """Yield the length of each prompt, or why the sample would be skipped."""
    for sample in samples[:NUM_SAMPLES]:
        try:
            yield len(function(sample).prompt.token_ids)
        except (VideoError, PromptTooLongError) as error:
            yield f"{sample.id} would be skipped: {error}"


def _memory(config: RunConfig, cluster: Cluster, job: Job) -> tuple[str, str]:
    layout, device = layout_of_run(config, job, cluster.num_gpus), cluster.device
    stages = training_memory(job, layout, device)
    fullest = max(stages, key=lambda stage: stage.total)
    part = fullest.largest_part
    text = f"about {fullest.total / 1e9:.0f} GB of {device.memory_bytes / 1e9:.0f} per GPU ({device.name}; largest "
    text += f"part: {part}, {getattr(fullest, part) / 1e9:.0f} GB)"
    if not device.is_cpu:
        host = cluster.used_per_node * max(stage.total for stage in host_memory(job, layout, device))
        text += f", and {host / 1e9:.0f} GB in the host memory of a node"
    if fullest.total > device.memory_bytes:
        return "warning", f"{text}: too much; `vcr1 plan` compares layouts"
    needs_engine = config.train.stage == "grpo" or config.validation.benchmarks
    if needs_engine and config.rollout.engine == "sglang" and config.sglang.colocated and not config.sglang.urls:
        left = max(0.0, 1 - max(stage.resident for stage in stages) / device.memory_bytes)
        if config.sglang.memory_fraction > left:
            return "warning", f"{text}; training leaves {left:.2f} to servers: lower sglang.memory_fraction"
    return "ok", text


def _checkpoints(config: RunConfig, job: Job) -> tuple[str, str]:
    section = config.checkpoint
    each = checkpoint_bytes(job)
    # The newest ones, the best one, and the one that is being written.
    number = section.keep_last + 1 + (section.keep_best is not None)
    free = shutil.disk_usage(_existing(config.train.run_dir)).free
    text = f"{each / 1e9:.3g} GB each; up to {number} at once need {number * each / 1e9:.3g} GB; "
    text += f"{free / 1e9:,.0f} GB free"
    if section.keep_every is not None:
        text += f"; checkpoint.keep_every = {section.keep_every} keeps more"
    if each > free:
        raise UserError(f"{text}: the disk of train.run_dir cannot hold a checkpoint")
    return ("warning" if number * each > free else "ok"), text


def _servers(config: RunConfig, cluster: Cluster) -> tuple[str, str]:
    section = config.sglang
    needs_engine = config.train.stage == "grpo" or config.validation.benchmarks
    if config.rollout.engine != "sglang" or not needs_engine:
        return "ok", "none: the in-process engine" if needs_engine else "none"
    if section.urls:
        return "ok", f"{len(section.urls)} URLs, which are not contacted here"
    placement = replace(Placement.from_section(section), num_gpus=cluster.device.gpus_per_node)
    check_server_args(section)
    placement.server_gpus(cluster.used_per_node)
    if section.colocated:
        ranks = config.parallel.ranks_per_replica
        placement.check_sharing(max(1, cluster.used_per_node // ranks), section.num_servers)
    require_sglang(section.python)
    kind = "colocated" if section.colocated else "separate"
    return "ok", f"{section.num_servers} {kind} per node, {section.tensor} GPUs each; sglang is installed"


def _run_dir(config: RunConfig) -> tuple[str, str]:
    path, existing = config.train.run_dir, _existing(config.train.run_dir)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"train.run_dir = {path}: cannot be written to: {existing} is not a writable folder")
    steps = saved_steps(RunDir(path).checkpoints)
    if not steps:
        return "ok", f"{path}: a new run"
    check_stage(str(read_state(step_dir(RunDir(path).checkpoints, steps[-1])).trainer.get("stage")), config.train)
    return "ok", f"{path}: resumes from step {steps[-1]}"


def _existing(path: Path) -> Path:
    """Return the path itself, or the nearest folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
