"""The folder of a run: settings, metrics, rollouts and skipped samples, cut back to a checkpoint when it is resumed."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from megatron_vcr1.config.rendering import render_toml
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel.mesh import launched_world_size
from megatron_vcr1.training.environment import environment

logger = logging.getLogger(__name__)


class RunDir:
    """Written to by the job's first rank."""

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
        """Make the folder. Raises UserError if that or writing to it is impossible."""
        try:
            for folder in (self.checkpoints, self._rollouts):
                folder.mkdir(parents=True, exist_ok=True)
            (self.path / "starts.jsonl").touch()
        except OSError as error:
            raise UserError(f"train.run_dir = {self.path}: cannot be written to: {error}") from error

    def open(self, config: RunConfig, step: int) -> None:
        """Record the settings and this start, say what is set otherwise than at the one before, and drop what was
        written after `step`.

        Args:
            step: the checkpoint that the run goes on from; 0 for a start.

        Raises:
            OSError: the disk is full or failed.
        """
        settings = self.path / "config.toml"
        text = render_toml(config, documented=False)
        changed = changed_settings(settings.read_text(encoding="utf-8"), text) if step > 0 and settings.exists() else {}
        for name, (before, after) in changed.items():
            logger.info("changed since the last start: %s = %s (was %s)", name, after, before)
        _write(settings, text.encode())
        _append(self.path / "starts.jsonl", [{"step": step, "changed": changed, **environment(launched_world_size())}])
        for file in (self._metrics, self._skipped):
            if file.exists():
                _keep_rows_until(file, step)
        for file in self._rollouts.iterdir():
            written = re.fullmatch(r"step_(\d+)\.(jsonl|part)", file.name)  # what else is there is the user's
            if written and (written[2] == "part" or int(written[1]) > step):
                file.unlink()

    def add_metrics(self, row: Mapping[str, float | int | None]) -> None:
        """Append a step's metrics; a number that is not finite becomes null."""
        finite = {name: value if value is None or math.isfinite(value) else None for name, value in row.items()}
        _append(self._metrics, [finite])

    def add_skipped(self, step: int, skipped: Iterable[tuple[str, str]]) -> None:
        """List samples that a step could not use: (id, reason)."""
        _append(self._skipped, [{"step": step, "id": name, "reason": reason} for name, reason in skipped])

    def write_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """A step's groups, one a line; the file appears when it is whole."""
        _write(self._rollouts / f"step_{step}.jsonl", _lines(rows))

    def export_of(self, step: int, when: Literal["never", "end", "always"]) -> Path:
        """Where a step's checkpoint is exported to."""
        return self.export / f"step_{step}" if when == "always" else self.export

    def make_way_for(self, directory: Path) -> None:
        """Remove an earlier export, and what a killed run left of one.

        Raises:
            UserError: it holds exports of single steps, which `checkpoint.export = "always"` has written.
        """
        if any(directory.glob("step_*")):
            raise UserError(
                f"{directory} holds exports of steps: move them elsewhere, and start the same command again"
            )
        for old in (directory, *directory.parent.glob(f".{directory.name}.partial-*")):
            shutil.rmtree(old, ignore_errors=True)
        directory.parent.mkdir(parents=True, exist_ok=True)

    def note_export(self, step: int, directory: Path) -> None:
        """Record which step the newest export is of."""
        self._exported.write_text(json.dumps({"step": step, "directory": str(directory.relative_to(self.path))}))

    def is_exported(self, step: int, directory: Path) -> bool:
        """Whether a directory is the export of a step."""
        try:
            noted = json.loads(self._exported.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        return directory.is_dir() and noted == {"step": step, "directory": str(directory.relative_to(self.path))}


def changed_settings(before: str, after: str) -> dict[str, tuple[Any, Any]]:
    """What two files of settings have otherwise: `section.key` to the old and the new value, None where it is unset."""
    old, new = (
        {f"{section}.{key}": value for section, table in tomllib.loads(text).items() for key, value in table.items()}
        for text in (before, after)
    )
    names = dict.fromkeys((*old, *new))
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return text.encode("utf-8", "backslashreplace")  # half a surrogate pair has no UTF-8, but JSON has \ud83d


def _write(path: Path, content: bytes) -> None:
    """The file has its name when it is whole."""
    unfinished = path.with_suffix(".part")
    with _named(path):
        unfinished.write_bytes(content)
        os.replace(unfinished, path)


def _append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    if lines := _lines(rows):
        with _named(path), path.open("ab") as file:
            file.write(lines)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of writing name the file; a full disk's does not by itself."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _keep_rows_until(path: Path, step: int) -> None:
    """Drop the rows of later steps, and a last row that a killed run did not finish."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # it may end within a character
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    _write(path, "".join(kept).encode())
