"""Weights, prompts and video settings of a result, and how they differ from those of the model's training."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

from megatron_vcr1.config.data_sections import DataSection
from megatron_vcr1.config.loading import load_config
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.templates import DEFAULT_TEMPLATES, template_file
from megatron_vcr1.errors import UserError

logger = logging.getLogger(__name__)

_NOT_READING = {"sources", "thinking", "templates", "num_workers", "video_cache_mb", "tasks", "python_path"}
"""Keys of [data] that do not change how a video is read."""


def video_settings(data: DataSection) -> dict[str, Any]:
    """Return the settings of [data] that determine a prompt's frames and length."""
    return data.model_dump(mode="json", exclude=_NOT_READING)


def templates_digest(templates: str | Path | None) -> str:
    """Return a digest of a template file, or of a preset's; empty for the default templates."""
    file = template_file(templates)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file else ""


def weights_digest(model_dir: Path) -> str:
    """Return a digest of the names, sizes and modification times of a model's files."""
    files = sorted(path for path in model_dir.rglob("*") if path.is_file())
    facts = [(str(path.relative_to(model_dir)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def holds_training(run_dir: Path) -> bool:
    """Return whether a folder holds a training run, and not only evaluations."""
    return (run_dir / "checkpoints").is_dir() or (run_dir / "metrics.jsonl").exists()


def training_run_of(model: Path) -> Path | None:
    """Return the folder of the run that trained a model; None if it is not the export or a checkpoint of a run."""
    # RUN/export, RUN/export/step_N or RUN/checkpoints/step_N. A checkpoint, or the model's path, may be a link.
    folders = [*list(model.absolute().parents)[:2], *list(model.resolve().parents)[:2]]
    return next((path for path in folders if (path / "config.toml").exists() and holds_training(path)), None)


def training_of(run_dir: Path) -> RunConfig | None:
    """Return the settings of a training run; None, and a warning, if they cannot be read."""
    try:
        return load_config(run_dir / "config.toml")
    except UserError as error:  # settings of another version, or edited
        logger.warning("the prompts cannot be compared with those of the model's training: %s", error)
        return None


def differences_from_training(training: RunConfig, data: DataSection, thinking: bool) -> list[str]:
    """Describe how an evaluation's prompts differ from those that a model was trained with.

    Args:
        training: settings of the training.
        data: the [data] section of the evaluation.
        thinking: whether the evaluation asks for reasoning before the answer.
    """
    found = []
    trained_ways = {source.thinking for source in training.data.sources}
    if trained_ways and thinking not in trained_ways:
        found.append(f"asks {_how(thinking)}, but the model was trained {_how(not thinking)}")
    if _content(data.templates) != _content(training.data.templates):
        found.append(
            f"templates {_shown(data.templates)}, but the model was trained with {_shown(training.data.templates)}"
        )
    before, now = video_settings(training.data), video_settings(data)
    if changed := [_changed(key, now[key], before[key]) for key in now if now[key] != before[key]]:
        found.append(f"data.{', data.'.join(changed)}")
    return found


def describe_prompts(data: DataSection, thinking: bool) -> str:
    """Describe templates and thinking for the log."""
    return f"{_how(thinking)}, templates: {_shown(data.templates)}"


def _changed(key: str, now: object, before: object) -> str:
    shown, trained = ("unset" if value is None else value for value in (now, before))
    return f"{key} = {shown} (training: {trained})"


def _how(thinking: bool) -> str:
    return "with thinking" if thinking else "without thinking"


def _shown(templates: str | Path | None) -> str:
    return str(templates or DEFAULT_TEMPLATES)


def _content(templates: str | Path | None) -> str:
    """Return the digest of a template file; its path if the file is gone."""
    try:
        return templates_digest(templates)
    except (OSError, UserError):
        return str(templates)
