"""Evaluates a model on the benchmarks of [evaluate]; a killed evaluation resumes from its prediction files."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vcr1.checkpoint.hf_stream import stream_hf_tensors
from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.layout import check_layout
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.shared_memory import warn_if_shared_memory_is_small
from megatron_vcr1.data.templates import (
    DEFAULT_TEMPLATES,
    PromptTemplates,
    build_messages,
    load_templates,
)
from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation.benchmark_result import BenchmarkResult, score_predictions, write_result
from megatron_vcr1.evaluation.jobs import (
    METRICS_FILE,
    PREDICTIONS_FILE,
    SAMPLES_FILE,
    BenchmarkJob,
    judge_for_jobs,
    prepare_fn_of_job,
    read_jobs,
    templates_of_jobs,
)
from megatron_vcr1.evaluation.predictions import PredictionLog
from megatron_vcr1.evaluation.predictor import Predictor
from megatron_vcr1.evaluation.provenance import (
    describe_prompts,
    differences_from_training,
    holds_training,
    templates_digest,
    training_of,
    training_run_of,
    video_settings,
    weights_digest,
)
from megatron_vcr1.judge import Judge
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.mrope import check_prompt
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.collectives import run_on_first_rank
from megatron_vcr1.rollout.build import build_engine, disable_nccl_cumem
from megatron_vcr1.rollout.engine import RolloutEngine
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from megatron_vcr1.tasks import load_tasks
from megatron_vcr1.text_files import read_json, require_object
from megatron_vcr1.types import Sample

logger = logging.getLogger(__name__)

SETTINGS_FILE = "settings.json"


def evaluate_model(config: RunConfig) -> list[BenchmarkResult]:
    """Evaluate the model on every benchmark. All ranks of the job call it.

    Predictions that are in the files already are not generated again. If all of them are there, no model is loaded.

    Returns:
        The results on the first rank, and an empty list on the other ranks.

    Raises:
        UserError: before anything is computed, if benchmarks, manifests, model or layout are invalid, if train.run_dir
            belongs to the training of another model, or if a folder holds predictions for other settings.
    """
    check_run_dir(config.train.run_dir, config.model.path)
    load_tasks(config.data.tasks, config.data.python_path)
    if not config.evaluate.benchmarks:
        raise UserError("evaluate.benchmarks: nothing to evaluate; add a table [[evaluate.benchmarks]]")
    jobs = read_jobs(config.evaluate.benchmarks, config.train.run_dir / "evaluation", key="evaluate.benchmarks")
    judge = judge_for_jobs(jobs, config.judge, config.train.run_dir / "judge_cache")
    model_config = ModelConfig.from_pretrained(config.model.path)
    check_layout(model_config.shape, config.parallel, config.recompute, mesh.launched_world_size())
    templates = templates_of_jobs(jobs, load_templates(config.data.templates), key="evaluate.benchmarks")
    processor = PromptProcessor.from_pretrained(config.model.path, model_config)
    for job in jobs:
        processor.check_samples(job.samples)
    tokens = SpecialTokens.from_pretrained(config.model.path, processor, model_config.num_embeddings)
    disable_nccl_cumem(config.rollout, config.sglang)
    with mesh.world(config.parallel, seed=config.train.seed):
        logs: dict[str, PredictionLog] = {}  # only the first rank opens them
        differences: dict[str, list[str] | None] = {}

        def open_logs() -> list[list[int]]:
            differences.update(_announce(jobs, config))
            logs.update((job.label, _open_log(job, _settings(job, config), templates[job.label])) for job in jobs)
            return [_indices_to_predict(job, logs[job.label]) for job in jobs]

        missing = run_on_first_rank(open_logs)  # all ranks get the indices, or the first rank's UserError
        if any(missing):
            if mesh.is_first_rank_on_host():
                warn_if_shared_memory_is_small(config.data, processor, num_readers=mesh.num_leaders_on_host())
            engine = _start_engine(config, model_config, processor, tokens)
            check = partial(check_prompt, config=model_config)
            try:
                for job, indices in zip(jobs, missing, strict=True):
                    samples = [job.samples[index] for index in indices]
                    predictor = Predictor(
                        engine,
                        processor,
                        prepare_fn_of_job(job, config.data, templates[job.label], processor, check),
                        max_new_tokens=config.evaluate.max_new_tokens,
                        prompts_per_batch=config.evaluate.prompts_per_batch,
                        num_workers=config.data.num_workers,
                    )
                    log = logs.get(job.label)
                    predictor.predict(samples, log.append if log is not None else None, label=job.label)
            finally:
                engine.close()
    # A judge may take long. The process groups are gone by now, so the other ranks do not wait for it.
    return [_score(job, logs[job.label], judge, config, differences[job.label]) for job in jobs if logs]


def check_run_dir(run_dir: Path, model: Path) -> None:
    """Refuse to write results of another model into the folder of a training run.

    The run's report would show them among the run's own results. This happens when the TOML of the training is
    evaluated as it is: its model.path is the base model.

    Raises:
        UserError: `run_dir` holds a training run, and `model` is not in it.
    """
    if not holds_training(run_dir):
        return
    # A checkpoint may be a link to another disk, and the run's folder itself may be reached through a link.
    if model.absolute().is_relative_to(run_dir.absolute()) or model.resolve().is_relative_to(run_dir.resolve()):
        return
    raise UserError(
        f"train.run_dir = {run_dir} holds a training run, and model.path = {model} is not its model. To evaluate the "
        f"trained model with the prompts of its training, use `vcr1 evaluate --run {run_dir}`, or set --model.path to "
        f"{run_dir / 'export'} or a checkpoint in {run_dir / 'checkpoints'}. To evaluate {model}, set another "
        "--train.run_dir for its results"
    )


def _announce(jobs: Sequence[BenchmarkJob], config: RunConfig) -> dict[str, list[str] | None]:
    """Log what is evaluated; warn if it is not the trained model, or if its prompts are not those of its training.

    Returns:
        The differences from the model's training by label of the benchmark; None if the training is not known.
    """
    run_dir = training_run_of(config.model.path)
    training = None if run_dir is None else training_of(run_dir)
    if run_dir is None and config.data.sources:
        logger.warning(
            "%s is not trained by these settings: it is the model that their training starts from. After the training, "
            "`vcr1 evaluate --run %s` evaluates the result",
            config.model.path,
            config.train.run_dir,
        )
        training = config
    differences: dict[str, list[str] | None] = {}
    for job in jobs:
        thinking = job.source.thinking
        logger.info("%s: %s, %s", job.label, config.model.path, describe_prompts(config.data, thinking))
        found = differences_from_training(training, config.data, thinking) if training else None
        for difference in found or ():
            logger.warning("%s: %s", job.label, difference)
        differences[job.label] = found
    return differences


def _start_engine(
    config: RunConfig, model_config: ModelConfig, processor: PromptProcessor, tokens: SpecialTokens
) -> RolloutEngine:
    """Load the model and start its engine. All ranks call it."""
    model = build_model(model_config, config.model, config.parallel, config.recompute).to(mesh.device()).eval()
    load_model_weights(model, config.model.path)
    engine = build_engine(config, model, processor, tokens)
    engine.update_weights(stream_hf_tensors(model), version=0)  # the user's own servers may hold other weights
    return engine


def _indices_to_predict(job: BenchmarkJob, log: PredictionLog) -> list[int]:
    """Return the indices of the samples without a prediction."""
    return [index for index, sample in enumerate(job.samples) if sample.id not in log.done]


def _open_log(job: BenchmarkJob, settings: Mapping[str, Any], templates: PromptTemplates) -> PredictionLog:
    """Open the log of the predictions that exist already.

    Args:
        job: the benchmark.
        settings: the settings that predictions depend on, see `_settings`.
        templates: templates of the prompts.

    Raises:
        UserError: they were generated with other settings.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    path = job.folder / SETTINGS_FILE
    if path.exists() and (job.folder / PREDICTIONS_FILE).exists():
        try:
            before = require_object(read_json(path), path)
        except UserError as error:
            raise UserError(f"{error}; remove its folder to evaluate again") from None
        changed = sorted(key for key in settings if before.get(key) != settings[key])
        if changed:
            raise UserError(
                f"{job.folder}: holds predictions with another {' and '.join(changed)}; give the benchmark another "
                "label, give the run another train.run_dir, or remove the folder"
            )
    else:
        (job.folder / PREDICTIONS_FILE).unlink(missing_ok=True)
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    digests = {sample.id: _prompt_digest(sample, templates, thinking=job.source.thinking) for sample in job.samples}
    log = PredictionLog(job.folder / PREDICTIONS_FILE, digests)
    if log.num_outdated:
        logger.warning(
            "%s: the prompts of %d samples have changed since their predictions were generated: they are repeated",
            job.source.manifest,
            log.num_outdated,
        )
    return log


def _prompt_digest(sample: Sample, templates: PromptTemplates, *, thinking: bool) -> str:
    """Return a digest of a sample's prompt: the text, the video and the clip."""
    messages = build_messages(sample, templates, thinking=thinking)
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]


def _settings(job: BenchmarkJob, config: RunConfig) -> dict[str, Any]:
    """Return the settings that a prediction depends on, except for its sample.

    A prediction is stored with its sample's id and prompt digest, so samples may be added or changed.
    """
    return {
        "model": str(config.model.path),
        "weights": weights_digest(config.model.path),
        "dtype": config.model.dtype,
        "manifest": str(job.source.manifest),
        "thinking": job.source.thinking,
        "prompt": job.source.prompt or job.benchmark.task,
        "max_new_tokens": config.evaluate.max_new_tokens,
        "templates": templates_digest(config.data.templates),
        "data": video_settings(config.data),
    }


def _score(
    job: BenchmarkJob, log: PredictionLog, judge: Judge | None, config: RunConfig, differences: Sequence[str] | None
) -> BenchmarkResult:
    """Score the predictions of a benchmark, and write the files of its result."""
    log.rewrite([sample.id for sample in job.samples])
    matched = [log.done[sample.id] for sample in job.samples]
    result = score_predictions(job.benchmark, job.samples, matched, judge)
    training_run = training_run_of(config.model.path)
    details = {
        "label": job.label,
        "model": str(config.model.path.absolute()),
        "training_run": None if training_run is None else str(training_run),
        "weights": weights_digest(config.model.path),
        "thinking": job.source.thinking,
        "prompt": job.source.prompt or job.benchmark.task,
        "templates": str(config.data.templates or DEFAULT_TEMPLATES),
        "video": video_settings(config.data),
        "differs_from_training": differences,
        "manifest": str(job.source.manifest.absolute()),
    }
    write_result(result, job.folder / METRICS_FILE, job.folder / SAMPLES_FILE, details)
    return result
