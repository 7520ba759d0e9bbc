"""The rollout benchmark's engines give the same greedy responses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vcr1.model.presets import PRESETS
from megatron_vcr1.parallel import mesh
from megatron_vcr1.throughput.random_weights import write_random_model
from megatron_vcr1.throughput.rollout import OURS, TRANSFORMERS, UNSHARED, measure
from megatron_vcr1.throughput.update_case import UpdateCase

pytestmark = pytest.mark.xdist_group("gloo")


def test_greedy_responses_agree_and_every_side_is_timed(tmp_path: Path) -> None:
    write_random_model(tmp_path / "model", PRESETS["tiny"], dtype=torch.float32)
    case = UpdateCase(str(tmp_path / "model"), None, num_prompts=2, prompt_tokens=130, group_size=3, response_tokens=5)
    with mesh.world(case.run_config.parallel):
        result = measure(case, rounds=2)
    assert result["equal_greedy_tokens"] == 1.0
    assert list(result["sides"]) == [OURS, UNSHARED, TRANSFORMERS]
    for side in result["sides"].values():
        assert len(side["seconds"]) == 2
        assert side["tokens_per_second"] == pytest.approx(2 * 3 * 5 / (2 * side["seconds_per_group"]))
