"""A training run as evaluation and generation use it: its newest weights, prompts and video settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vcr1.checkpoint.step_dirs import saved_steps, step_dir
from megatron_vcr1.config.evaluation_sections import BenchmarkSource
from megatron_vcr1.config.loading import load_config
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.manifest import read_manifest
from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import load_tasks
from megatron_vcr1.text_files import read_json


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """A run directory with trained weights.

    Attributes:
        path: the run directory.
        config: the settings of its training.
        model: the newest weights: its export, or its latest checkpoint if that is of a later step.
    """

    path: Path
    config: RunConfig
    model: Path


def open_run(path: Path) -> TrainedRun:
    """Open a run directory.

    Raises:
        UserError: it is not a run directory, or has neither an export nor a checkpoint.
    """
    settings = path / "config.toml"
    if not settings.exists():
        raise UserError(f"--run {path}: no config.toml in it; name the folder of a training run (train.run_dir)")
    steps = saved_steps(path / "checkpoints")
    exported = _export(path)
    if exported is not None and (not steps or exported[0] >= steps[-1]):
        model = exported[1]
    elif steps:
        model = step_dir(path / "checkpoints", steps[-1])
    else:
        raise UserError(f"--run {path}: the run has neither an export nor a checkpoint yet")
    config = load_config(settings)
    load_tasks(config.data.tasks, config.data.python_path)
    return TrainedRun(path, config, model)


def _export(path: Path) -> tuple[int, Path] | None:
    """Return the step and the directory of the run's export; None if there is none."""
    record = path / "exported.json"  # the run writes it when its export is complete
    if not record.exists():
        return None
    noted = read_json(record)
    if not isinstance(noted, dict) or type(noted.get("step")) is not int or not isinstance(noted.get("directory"), str):
        return None
    directory = path / noted["directory"]
    return (noted["step"], directory) if directory.is_dir() else None


def evaluation_config(
    run: TrainedRun, config_file: Path | None, manifests: Sequence[Path], options: Sequence[str]
) -> RunConfig:
    """Return the settings with which a run's newest weights are evaluated as they were trained.

    Model, templates, video settings and thinking are the run's, and results go into the run's folder. A benchmark of
    `config_file` that sets its own thinking keeps it.

    Args:
        run: the run.
        config_file: file with the benchmarks, the layout and the engine; None takes those of the run.
        manifests: manifests to evaluate in place of the benchmarks: each task in them is a benchmark.
        options: `--section.key VALUE` options, which take precedence.

    Raises:
        UserError: a file cannot be read, or the run trains both with and without thinking and no option decides.
    """
    inherited = ["--model.path", str(run.model), "--train.run_dir", str(run.path)]
    ways = {source.thinking for source in run.config.data.sources}
    if len(ways) == 1:
        inherited += ["--evaluate.thinking", str(*ways).lower()]
    elif (config_file or manifests) and not any(option.startswith("--evaluate.thinking") for option in options):
        raise UserError(
            f"--run {run.path}: it was trained on some sources with thinking and on others without; choose with "
            "--evaluate.thinking true or false"
        )
    own = load_config(run.path / "config.toml", [*inherited, *options])
    config = own
    if config_file is not None:
        config = load_config(config_file, [*inherited, *options])
        config = config.model_copy(update={"model": own.model, "data": own.data})
    if manifests:
        sources = tuple(source for manifest in manifests for source in _benchmarks(manifest, config.evaluate.thinking))
        config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"benchmarks": sources})})
    elif not config.evaluate.benchmarks:
        raise UserError(
            f"--run {run.path}: nothing to evaluate; name test data with --manifest FILE.jsonl, or a CONFIG.toml with "
            "tables [[evaluate.benchmarks]]"
        )
    return config


def trained_tasks(run: TrainedRun) -> list[str]:
    """Return the tasks of a run's training data, in order of appearance.

    Raises:
        UserError: a manifest of the training is gone or has bad rows.
    """
    return list(
        dict.fromkeys(sample.task for source in run.config.data.sources for sample in read_manifest(source.manifest))
    )


def _benchmarks(manifest: Path, thinking: bool) -> Iterator[BenchmarkSource]:
    """Yield a benchmark for each task in a manifest; it is labelled with the manifest's name."""
    tasks = list(dict.fromkeys(sample.task for sample in read_manifest(manifest)))
    for task in tasks:
        label = manifest.stem if len(tasks) == 1 else f"{manifest.stem}_{task}"
        yield BenchmarkSource(name=task, manifest=manifest, label=label, thinking=thinking)
