"""The state of a training run besides its tensors, and state.json, which stores it in a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vcr1.checkpoint.disk import write_durably
from megatron_vcr1.checkpoint.model_dir import STATE_FILE
from megatron_vcr1.errors import UserError
from megatron_vcr1.json_fields import Fields

_VERSION = 2


@dataclass(frozen=True, slots=True)
class TrainingState:
    """The state of a training run besides its tensors; JSON values."""

    step: int  # training steps done
    num_updates: int  # steps that Adam has taken; fewer than `step` if updates were skipped
    schedule: Mapping[str, Any]  # state of the learning-rate schedule
    trainer: Mapping[str, Any]  # data position and whatever else the trainer stores
    reference: str | None = None  # fingerprint of the reference's weights, if the run has ever needed it

    def to_json(self) -> str:
        content = {
            "version": _VERSION,
            "step": self.step,
            "updates": self.num_updates,
            "schedule": self.schedule,
            "state": self.trainer,
            "reference": self.reference,
        }
        return json.dumps(content, indent=1)


def write_state(checkpoint: Path, text: str) -> None:
    """Write state.json durably. The text comes from `TrainingState.to_json`, before training goes on."""
    write_durably(checkpoint / STATE_FILE, text.encode())


def read_state(checkpoint: Path) -> TrainingState:
    """Read state.json.

    Raises:
        UserError: it is missing or damaged, or has another version.
    """
    path = checkpoint / STATE_FILE
    try:
        content = Fields.from_file(path)
        version = content.integer("version")
        if version == _VERSION:
            return TrainingState(
                content.integer("step", minimum=0, maximum=2**62),
                content.integer("updates", minimum=0, maximum=2**62),
                content.section("schedule").values,
                content.section("state").values,
                content.text("reference", None),  # missing in checkpoints that were written before it was introduced
            )
    except UserError as error:
        raise UserError(f"{path}: damaged or missing ({str(error).removeprefix(f'{path}: ')})") from None
    raise UserError(
        f"{path}: has version {version}, but only version {_VERSION} can be read; choose another train.run_dir, with "
        "the checkpoint as model.path"
    )
