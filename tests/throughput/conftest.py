"""A small update for the tests of all sides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vcr1.model.presets import PRESETS
from megatron_vcr1.parallel import mesh
from megatron_vcr1.throughput.random_weights import write_random_model
from megatron_vcr1.throughput.update_case import UpdateCase
from megatron_vcr1.throughput.update_ours import OurUpdate


@pytest.fixture(scope="session")
def case(tmp_path_factory: pytest.TempPathFactory) -> UpdateCase:
    """Two prompts with three responses each, and random weights of policy and reference."""
    folder = tmp_path_factory.mktemp("update")
    for seed, name in enumerate(("policy", "reference")):
        write_random_model(folder / name, PRESETS["tiny"], dtype=torch.float32, seed=seed)
    return UpdateCase(
        model_dir=str(folder / "policy"),
        reference_dir=str(folder / "reference"),
        num_prompts=2,
        prompt_tokens=150,
        group_size=3,
        response_tokens=7,
        microbatch_tokens=180,  # one group per microbatch
    )


@pytest.fixture(scope="session")
def ours(case: UpdateCase, tmp_path_factory: pytest.TempPathFactory) -> tuple[float, Path]:
    """The loss of our update and the file with its gradients."""
    return our_update(case, tmp_path_factory.mktemp("ours") / "gradients.safetensors")


def our_update(case: UpdateCase, path: Path) -> tuple[float, Path]:
    with mesh.world(case.run_config.parallel):
        update = OurUpdate(case)
        loss = update.run()
        update.save_gradients(path)
    return loss, path
