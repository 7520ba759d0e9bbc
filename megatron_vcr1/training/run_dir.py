"""The run directory: settings, metrics, rollouts, skipped samples and exports of a run."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_vcr1.checkpoint.disk import file_named_in_errors
from megatron_vcr1.config.rendering import render_toml
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel.mesh import launched_world_size
from megatron_vcr1.text_files import parse_json, parse_toml, read_json, read_lines, read_text
from megatron_vcr1.training.environment import environment

logger = logging.getLogger(__name__)

VALIDATION_FOLDER = "validation"
VALIDATION_PREFIX = "validation/"
"""Prefix of the metrics of a validation, which has a line of its own in metrics.jsonl."""


class RunDir:
    """The files of a run. Only rank 0 writes to it.

    Attributes:
        checkpoints: folder of the checkpoints (`checkpoint.run_store`).
        export: folder of the Hugging Face export, or of the exports of single steps.
        profile: folder of the profiles.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.export = path / "export"
        self.profile = path / "profile"
        self._metrics = path / "metrics.jsonl"
        self._skipped = path / "skipped.jsonl"
        self._rollouts = path / "rollouts"
        self._exported = path / "exported.json"

    def create(self) -> None:
        """Create the folders. Raises UserError if they cannot be created or written to."""
        try:
            for folder in (self.checkpoints, self._rollouts):
                folder.mkdir(parents=True, exist_ok=True)
            (self.path / "starts.jsonl").touch()
        except OSError as error:
            raise UserError(f"train.run_dir = {self.path}: cannot be written to: {error}") from error

    def open(
        self, config: RunConfig, step: int, validated_step: int | None = None, *, num_steps: int | None = None
    ) -> None:
        """Record the settings and this start, log the settings that changed, and drop the records of later steps.

        A run that was killed may have recorded steps after its newest checkpoint. The resumed run computes them again.

        Args:
            step: step of the checkpoint that the run resumes from; 0 for a new run.
            validated_step: step of the last validation before that checkpoint; None without any.
            num_steps: length of the run.

        Raises:
            OSError: the disk is full or failed.
        """
        settings = self.path / "config.toml"
        text = render_toml(config, documented=False)
        changed = changed_settings(read_text(settings), text) if step > 0 and settings.exists() else {}
        for name, (before, after) in changed.items():
            logger.info("changed since the last start: %s = %s (was %s)", name, after, before)
        _write_atomically(settings, text.encode())
        start = {"step": step, "num_steps": num_steps, "changed": changed, **environment(launched_world_size())}
        _append(self.path / "starts.jsonl", [start])
        last_validation = -1 if validated_step is None else validated_step
        for file in (self._metrics, self._skipped):
            if file.exists():
                _drop_rows_after(file, step, last_validation)
        for file in self._rollouts.iterdir():
            written = re.fullmatch(r"step_(\d+)\.(jsonl|part)", file.name)  # other files are the user's
            if written and (written[2] == "part" or int(written[1]) > step):
                file.unlink()
        for folder in (self.path / VALIDATION_FOLDER).glob("step_*"):
            number = folder.name.removeprefix("step_")
            if number.isdecimal() and int(number) > last_validation:
                shutil.rmtree(folder)

    def add_metrics(self, row: Mapping[str, float | int | None]) -> None:
        """Append a step's metrics. Numbers that are not finite become null: JSON has no NaN or infinity."""
        finite = {name: value if value is None or math.isfinite(value) else None for name, value in row.items()}
        _append(self._metrics, [finite])

    def add_skipped(self, step: int, skipped: Iterable[tuple[str, str]], *, benchmark: str | None = None) -> None:
        """Append the samples that a step, or the validation after it, could not use.

        Args:
            skipped: id and reason of each sample.
            benchmark: label of the validation benchmark; None for a training step.
        """
        where = {} if benchmark is None else {"validation": benchmark}
        _append(self._skipped, [{"step": step, **where, "id": name, "reason": reason} for name, reason in skipped])

    def write_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write a step's groups, one per line. The file appears under its name when it is complete."""
        _write_atomically(self._rollouts / f"step_{step}.jsonl", _lines(rows))

    def export_dir(self, step: int, when: Literal["never", "end", "best", "always"]) -> Path:
        """Return the directory that a step's checkpoint is exported to.

        Args:
            when: the setting checkpoint.export.
        """
        return self.export / f"step_{step}" if when == "always" else self.export

    def remove_old_export(self, directory: Path) -> None:
        """Remove an earlier export of that name, and incomplete exports of killed runs.

        Raises:
            UserError: the directory holds exports of single steps, written with `checkpoint.export = "always"`; or it
                is for such an export, and the folder above holds one that was written with another value.
        """
        if any(directory.glob("step_*")):
            raise UserError(
                f"{directory} holds exports of single steps: move them elsewhere and run the same command again"
            )
        if directory != self.export and any(self.export.glob("*.safetensors")):
            raise UserError(  # whoever loads train.run_dir/export would get the old weights
                f"{self.export} holds an export that checkpoint.export = 'always' does not update: move its files "
                "elsewhere and run the same command again"
            )
        for old in (directory, *directory.parent.glob(f".{directory.name}.partial-*")):
            shutil.rmtree(old, ignore_errors=True)
        directory.parent.mkdir(parents=True, exist_ok=True)

    def note_export(self, step: int, directory: Path) -> None:
        """Record that `directory` is the complete export of a step."""
        self._exported.write_text(json.dumps({"step": step, "directory": str(directory.relative_to(self.path))}))

    def is_exported(self, step: int, directory: Path) -> bool:
        """Return whether `directory` is the complete export of a step, as `note_export` recorded."""
        try:
            noted = read_json(self._exported)
        except UserError:
            return False
        return directory.is_dir() and noted == {"step": step, "directory": str(directory.relative_to(self.path))}


def changed_settings(before: str, after: str) -> dict[str, tuple[Any, Any]]:
    """Return the diff of two configurations.

    Args:
        before, after: contents of config.toml.

    Returns:
        `section.key` to the old and the new value; None for a key that is unset.
    """
    old, new = (
        {
            f"{section}.{key}": value
            for section, table in parse_toml(text, "config.toml").items()
            for key, value in table.items()
        }
        for text in (before, after)
    )
    names = dict.fromkeys((*old, *new))
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # A policy can sample half of a surrogate pair. UTF-8 cannot encode it; JSON can, as an escape such as \ud83d.
    return text.encode("utf-8", "backslashreplace")


def _write_atomically(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, and rename it when it is complete."""
    unfinished = path.with_suffix(".part")
    with file_named_in_errors(path):
        unfinished.write_bytes(content)
        os.replace(unfinished, path)


def _append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    if lines := _lines(rows):
        with file_named_in_errors(path), path.open("ab") as file:
            file.write(lines)


def _drop_rows_after(path: Path, step: int, validated_step: int) -> None:
    """Drop the rows of later steps and of later validations, and an incomplete last row of a killed run."""
    kept = []
    # errors="replace": an incomplete row may end within a character.
    for line in read_lines(path, errors="replace"):
        try:
            row = parse_json(line, path)
        except UserError:
            continue
        # "validation/LABEL/METRIC" in metrics.jsonl, "validation" in skipped.jsonl
        is_validation = any(name.startswith("validation") for name in row)
        if row["step"] <= (validated_step if is_validation else step):
            kept.append(line.removesuffix("\n") + "\n")
    _write_atomically(path, "".join(kept).encode())
