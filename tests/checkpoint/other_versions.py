"""One side of test_other_versions.py: saves a toy run, or loads one that the other environment has saved.

    python -m tests.checkpoint.other_versions MODEL_DIR LOADED_DIR SAVED_DIR

resumes from the checkpoint in LOADED_DIR, prints its state as JSON, and saves a run of its own in SAVED_DIR.
"""

from __future__ import annotations

import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from megatron_vcr1.checkpoint.optimizer_state import num_updates, optimizer_slices
from megatron_vcr1.checkpoint.shard_slices import parameter_slices
from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.model import cpu
from megatron_vcr1.parallel import mesh
from tests.checkpoint.toy_run import ToyRun

# With bfloat16 a checkpoint also contains float32 master weights.
SETTINGS = {"model": {"dtype": "bfloat16"}}


def state(run: ToyRun) -> dict[str, str | int]:
    """Return the SHA-256 of every weight and of every tensor of the optimizer, by key, and the counts of steps."""
    parameters = parameter_slices(run.learner.ddp_model.module)
    slices = [part for parts in parameters.values() for part in parts]
    for distributed in (False, True):
        slices += optimizer_slices(run.learner.optimizer, parameters, distributed=distributed)
    digests = {
        f"{part.key} {part.offsets}": hashlib.sha256(
            part.values.detach().flatten().view(torch.uint8).numpy()
        ).hexdigest()
        for part in slices
    }
    return {**digests, "steps": run.steps, "updates": num_updates(run.learner.optimizer)}


def save(model_dir: Path, directory: Path) -> dict[str, str | int]:
    """Train two steps and save; return the state."""
    run = ToyRun(model_dir, directory, SETTINGS)
    run.train(2)
    run.save()
    run.store.finish()
    return state(run)


def load(model_dir: Path, directory: Path) -> dict[str, str | int]:
    """Resume from the newest checkpoint; return the state, after a check that training goes on."""
    run = ToyRun(model_dir, directory, SETTINGS)
    assert run.resume() == 2
    loaded = state(run)
    ((loss, _),) = run.train(1)
    assert 0 < loss < 20
    return loaded


def main() -> None:
    model_dir, loaded_dir, saved_dir = map(Path, sys.argv[1:])
    cpu.install()
    with mesh.world(ParallelSection()):
        loaded, saved = load(model_dir, loaded_dir), save(model_dir, saved_dir)
    print(json.dumps({"megatron-core": version("megatron-core"), "loaded": loaded, "saved": saved}))


if __name__ == "__main__":
    main()
