"""The folder of a run: settings, metrics, rollouts and skipped samples, cut back to a checkpoint when it is resumed."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_vcr1.config.rendering import render_toml
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel.groups import world_size
from megatron_vcr1.training.environment import environment


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

    def open(self, config: RunConfig, step: int) -> None:
        """Make the folder, record the settings and this start, and drop what was written after `step`.

        Args:
            step: the checkpoint that the run goes on from; 0 for a start.

        Raises:
            UserError: the folder cannot be written to.
        """
        try:
            self._rollouts.mkdir(parents=True, exist_ok=True)
            (self.path / "config.toml").write_text(render_toml(config, documented=False), encoding="utf-8")
        except OSError as error:
            raise UserError(f"train.run_dir = {self.path}: cannot be written to: {error}") from error
        _append(self.path / "starts.jsonl", [{"step": step, **environment(world_size())}])
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
        path = self._rollouts / f"step_{step}.jsonl"
        unfinished = path.with_suffix(".part")
        unfinished.write_bytes(_lines(rows))
        os.replace(unfinished, path)


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return text.encode("utf-8", "backslashreplace")  # half a surrogate pair has no UTF-8, but JSON has \ud83d


def _append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    if lines := _lines(rows):
        with path.open("ab") as file:
            file.write(lines)


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
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text("".join(kept), encoding="utf-8")
    os.replace(unfinished, path)
