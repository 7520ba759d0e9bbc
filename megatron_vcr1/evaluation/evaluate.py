"""A model on the benchmarks of [evaluate]: its answers, their figures, and what of it is there already."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vcr1.checkpoint.hf_stream import stream_hf_tensors
from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.evaluation_sections import BenchmarkSource, JudgeSection
from megatron_vcr1.config.layout import check_layout
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.manifest import read_manifest
from megatron_vcr1.data.preparation import Decoder, preparation
from megatron_vcr1.data.processor import PromptProcessor, read_processor
from megatron_vcr1.data.prompts import PromptTemplates, build_messages, load_templates
from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation.benchmarks import Benchmark, find_benchmark
from megatron_vcr1.evaluation.generation import Answerer
from megatron_vcr1.evaluation.predictions import PredictionLog
from megatron_vcr1.evaluation.scoring import Evaluation, score_predictions, write_evaluation
from megatron_vcr1.judge import Judge, build_judge
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.qwen_vl import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.collectives import run_on_first_rank
from megatron_vcr1.rollout.build import build_engine, disable_nccl_cumem
from megatron_vcr1.rollout.engine import RolloutEngine
from megatron_vcr1.types import Task, VideoSample

logger = logging.getLogger(__name__)

PREDICTIONS_FILE = "predictions.jsonl"
SAMPLES_FILE = "samples.jsonl"
METRICS_FILE = "metrics.json"
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True, slots=True)
class Job:
    """One benchmark of a run: its samples and its folder."""

    source: BenchmarkSource
    benchmark: Benchmark
    samples: Sequence[VideoSample]
    folder: Path

    @property
    def label(self) -> str:
        return self.folder.name


def evaluate_model(config: RunConfig) -> list[Evaluation]:
    """Evaluates the model on every benchmark; every rank of the job calls it. Results are the first rank's alone.

    What was answered before a kill is not asked again. A run that lacks nothing but the scoring loads no model.

    Raises:
        UserError: before anything is computed, if benchmarks, manifests, model or layout are at fault, or a folder
            holds answers to other settings.
    """
    jobs = plan_jobs(config)
    judge = _judge_for(jobs, config.judge, config.train.run_dir / "judge_cache")
    model_config = ModelConfig.from_pretrained(config.model.path)
    check_layout(model_config.shape, config.parallel, config.recompute, mesh.launched_world_size())
    templates = load_templates(config.data.templates)
    processor = read_processor(config.model.path)
    disable_nccl_cumem(config.rollout, config.sglang)
    with mesh.world(config.parallel, seed=config.train.seed):
        logs: dict[str, PredictionLog] = {}  # on the first rank

        def unanswered() -> list[list[int]]:
            logs.update((job.label, _open_log(job, config, templates)) for job in jobs)
            return [_unanswered(job, logs[job.label]) for job in jobs]

        missing = run_on_first_rank(unanswered)
        if any(missing):
            engine = _start_engine(config, model_config, processor)
            try:
                for job, indices in zip(jobs, missing, strict=True):
                    samples = [job.samples[index] for index in indices]
                    answerer = _answerer(config, job.source, engine, processor, templates)
                    answerer.answer(samples, logs.get(job.label), job.label)
            finally:
                engine.close()
    # A judge may take long: the other ranks do not wait for it.
    return [_score(job, logs[job.label], judge, config) for job in jobs if logs]


def plan_jobs(config: RunConfig) -> list[Job]:
    """Reads the manifests of [[evaluate.benchmarks]].

    Raises:
        UserError: there are none, or one is wrong; names the key.
    """
    if not config.evaluate.benchmarks:
        raise UserError("evaluate.benchmarks: nothing to evaluate; add a table [[evaluate.benchmarks]]")
    jobs: dict[str, Job] = {}
    for index, source in enumerate(config.evaluate.benchmarks):
        label = source.label or source.name
        if Path(label).name != label or label == ".." or label in jobs:
            raise UserError(
                f"evaluate.benchmarks.{index}: label {label!r} must be the name of a folder of its own; set another"
            )
        benchmark = find_benchmark(source.name)
        samples = benchmark.select(read_manifest(source.manifest), source.manifest)[: source.max_samples]
        jobs[label] = Job(source, benchmark, samples, config.train.run_dir / "evaluation" / label)
    return list(jobs.values())


def _judge_for(jobs: Sequence[Job], section: JudgeSection, cache: Path) -> Judge | None:
    needed = any(job.benchmark.task is Task.CAPTIONING for job in jobs)
    return build_judge(section, cache) if needed else None


def _start_engine(config: RunConfig, model_config: ModelConfig, processor: PromptProcessor) -> RolloutEngine:
    model = build_model(model_config, config).to(mesh.device()).eval()
    load_model_weights(model, config.model.path)
    engine = build_engine(config, model, processor)
    engine.update_weights(stream_hf_tensors(model), version=0)  # servers of the user's own may hold others
    return engine


def _answerer(
    config: RunConfig,
    source: BenchmarkSource,
    engine: RolloutEngine,
    processor: PromptProcessor,
    templates: PromptTemplates,
) -> Answerer:
    return Answerer(
        engine,
        processor,
        preparation(config.data, templates, processor, Decoder(config.data), thinking=source.thinking),
        max_new_tokens=config.evaluate.max_new_tokens,
        prompts_per_batch=config.evaluate.prompts_per_batch,
        num_workers=config.data.num_workers,
    )


def _unanswered(job: Job, log: PredictionLog) -> list[int]:
    """Indices of samples."""
    return [index for index, sample in enumerate(job.samples) if sample.id not in log.done]


def _open_log(job: Job, config: RunConfig, templates: PromptTemplates) -> PredictionLog:
    """The answers so far, if the settings that they depend on are the same; without those to other questions."""
    job.folder.mkdir(parents=True, exist_ok=True)
    settings = _settings(job, config)
    path = job.folder / SETTINGS_FILE
    if path.exists() and (job.folder / PREDICTIONS_FILE).exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}; remove its folder to answer anew") from None
        changed = sorted(key for key in settings if before.get(key) != settings[key])
        if changed:
            raise UserError(
                f"{job.folder}: holds answers with another {' and '.join(changed)}; give the benchmark another label, "
                "give the run another train.run_dir, or remove the folder"
            )
    else:
        (job.folder / PREDICTIONS_FILE).unlink(missing_ok=True)
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    asked = {sample.id: _question(sample, templates, thinking=job.source.thinking) for sample in job.samples}
    log = PredictionLog(job.folder / PREDICTIONS_FILE, asked)
    if log.num_outdated:
        logger.warning(
            "%s: %d samples now ask something else than what was answered under their ids: they are asked again",
            job.source.manifest,
            log.num_outdated,
        )
    return log


def _question(sample: VideoSample, templates: PromptTemplates, *, thinking: bool) -> str:
    """Digest of what a sample asks the model: the words, the video and which part of it."""
    messages = build_messages(sample, templates, thinking=thinking)
    return hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16]


def _settings(job: Job, config: RunConfig) -> dict[str, Any]:
    """What an answer depends on besides its sample, whose id and question are with the answer: more may come."""
    templates = config.data.templates
    reading = config.data.model_dump(mode="json", exclude={"sources", "templates", "num_workers", "video_cache_mb"})
    return {
        "model": str(config.model.path),
        "weights": _fingerprint(config.model.path),
        "dtype": config.model.dtype,
        "manifest": str(job.source.manifest),
        "thinking": job.source.thinking,
        "max_new_tokens": config.evaluate.max_new_tokens,
        "templates": hashlib.sha256(templates.read_bytes()).hexdigest() if templates else "",
        "data": reading,
    }


def _fingerprint(model_dir: Path) -> str:
    """Changes with the files of a model's folder: their names, sizes and times."""
    files = sorted(path for path in model_dir.rglob("*") if path.is_file())
    facts = [(str(path.relative_to(model_dir)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _score(job: Job, log: PredictionLog, judge: Judge | None, config: RunConfig) -> Evaluation:
    log.arrange([sample.id for sample in job.samples])
    matched = [log.done[sample.id] for sample in job.samples]
    evaluation = score_predictions(job.benchmark, job.samples, matched, judge)
    about = {
        "label": job.label,
        "model": str(config.model.path),
        "thinking": job.source.thinking,
        "manifest": str(job.source.manifest.absolute()),
    }
    write_evaluation(evaluation, job.folder / METRICS_FILE, job.folder / SAMPLES_FILE, about)
    return evaluation
