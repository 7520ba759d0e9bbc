"""The benchmark's sides compute the same update."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from model_presets import PRESETS, model_config
from safetensors.torch import load_file
from throughput import train
from throughput.random_weights import num_weight_bytes, write_random_model
from throughput.update_case import UpdateCase
from throughput.update_ours import OurUpdate
from throughput.update_plain import PlainUpdate

from megatron_vcr1.errors import UserError
from megatron_vcr1.model.flops import Workload
from megatron_vcr1.model.packed_batch import pack
from megatron_vcr1.parallel import mesh

HAS_TRL = importlib.util.find_spec("trl") is not None
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
    return our_update(case, tmp_path_factory.mktemp("ours") / "gradients.safetensors")


def our_update(case: UpdateCase, path: Path) -> tuple[float, Path]:
    with mesh.world(case.run_config.parallel):
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
    plain = PlainUpdate(dataclasses.replace(case, recompute=recompute), full_logits=full_logits)
    check_agreement(plain, ours, tmp_path)


@pytest.mark.skipif(not HAS_TRL, reason="TRL is not installed")
@pytest.mark.parametrize("group_size", [3, 5])  # microbatches of 6 of both groups, of 5 of one each
def test_trl_agrees(case: UpdateCase, tmp_path: Path, group_size: int) -> None:
    from throughput.update_trl import TrlUpdate

    case = dataclasses.replace(case, group_size=group_size)
    trl = TrlUpdate(case)
    assert trl.notes["responses_a_microbatch"] * trl.notes["gradient_accumulation_steps"] == 2 * group_size
    check_agreement(trl, our_update(case, tmp_path / "ours.safetensors"), tmp_path)


def test_trl_is_a_side_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert train.sides_to_compare(None) == [train.OURS, train.PLAIN, train.PLAIN_KEPT]
    with pytest.raises(UserError, match="--sides trl: TRL is not installed"):
        train.sides_to_compare([train.TRL])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert train.sides_to_compare(None) == list(train.SIDES)
    assert train.sides_to_compare([train.TRL]) == [train.OURS, train.TRL]


def check_agreement(update: Any, ours: tuple[float, Path], folder: Path) -> None:
    loss, path = ours
    assert update.run() == pytest.approx(loss, abs=1e-6)
    update.save_gradients(folder / "gradients.safetensors")
    expected, gradients = load_file(folder / "gradients.safetensors"), load_file(path)
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
    assert plain.tokens == plain.targets == 2 * 3 * (150 + 7)


def test_a_prompt_without_room_for_a_video_is_refused(case: UpdateCase) -> None:
    with pytest.raises(ValueError, match="at least 128"):
        dataclasses.replace(case, prompt_tokens=100).groups(model_config("tiny"))


def test_cases_travel_as_json(case: UpdateCase) -> None:
    assert UpdateCase.from_json(case.to_json()) == case
