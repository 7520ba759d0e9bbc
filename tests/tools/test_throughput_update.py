"""The benchmark's two sides compute the same update."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from model_presets import PRESETS, model_config
from safetensors.torch import load_file
from throughput.random_weights import num_weight_bytes, write_random_model
from throughput.update_case import UpdateCase
from throughput.update_ours import OurUpdate
from throughput.update_plain import PlainUpdate

from megatron_vcr1.model.flops import Workload
from megatron_vcr1.model.packed_batch import pack
from megatron_vcr1.parallel import groups

pytestmark = pytest.mark.xdist_group("gloo")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> UpdateCase:
    folder = tmp_path_factory.mktemp("update")
    for seed, name in enumerate(("policy", "reference")):
        num_bytes = write_random_model(folder / name, PRESETS["tiny"], dtype=torch.float32, seed=seed)
        assert num_bytes == num_weight_bytes(PRESETS["tiny"], torch.float32)
    return UpdateCase(
        model_dir=str(folder / "policy"),
        reference_dir=str(folder / "reference"),
        num_prompts=2,
        prompt_tokens=150,
        group_size=3,
        response_tokens=7,
        microbatch_tokens=180,  # one group each
    )


@pytest.fixture(scope="module")
def ours(case: UpdateCase, tmp_path_factory: pytest.TempPathFactory) -> tuple[float, Path]:
    path = tmp_path_factory.mktemp("ours") / "gradients.safetensors"
    with groups.world(case.run_config.parallel):
        update = OurUpdate(case)
        assert len(update.batches) == 2
        loss = update.run()
        update.save_gradients(path)
    return loss, path


@pytest.mark.parametrize("full_logits", [True, False])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_both_sides_agree(
    case: UpdateCase, ours: tuple[float, Path], tmp_path: Path, full_logits: bool, recompute: str
) -> None:
    loss, path = ours
    plain = PlainUpdate(dataclasses.replace(case, recompute=recompute), full_logits=full_logits)
    assert plain.run() == pytest.approx(loss, abs=1e-6)
    plain.save_gradients(tmp_path / "gradients.safetensors")
    expected, gradients = load_file(tmp_path / "gradients.safetensors"), load_file(path)
    assert gradients.keys() == expected.keys()
    worst = max(float((gradients[name] - expected[name]).abs().max()) for name in expected)
    largest = max(float(one.abs().max()) for one in expected.values())
    assert worst < 1e-6 < 1e-3 < largest


def test_the_workload_is_what_is_packed(case: UpdateCase) -> None:
    config = model_config("tiny")
    packed = Workload.of_batch(config, pack(case.groups(config), config))
    assert packed == case.workload(config)
    plain = case.plain_workload(config)
    assert plain.patches == 3 * packed.patches
    assert plain.rows == plain.targets == 2 * 3 * (150 + 7)


def test_a_prompt_without_room_for_a_video_is_refused(case: UpdateCase) -> None:
    with pytest.raises(ValueError, match="at least 128"):
        dataclasses.replace(case, prompt_tokens=100).groups(model_config("tiny"))


def test_cases_travel_as_json(case: UpdateCase) -> None:
    assert UpdateCase.from_json(case.to_json()) == case
