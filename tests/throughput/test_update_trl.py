"""TRL's update has our loss and gradients."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_vcr1.throughput.update_case import UpdateCase
from tests.throughput.agreement import check_agreement
from tests.throughput.conftest import our_update

pytest.importorskip("trl")
pytestmark = pytest.mark.xdist_group("gloo")


@pytest.mark.parametrize("group_size", [3, 5])  # microbatches of 6 responses of both groups, or 5 of one group
def test_loss_and_gradients_equal_ours(case: UpdateCase, tmp_path: Path, group_size: int) -> None:
    from megatron_vcr1.throughput.update_trl import TrlUpdate

    case = dataclasses.replace(case, group_size=group_size)
    trl = TrlUpdate(case)
    assert trl.notes["responses_per_microbatch"] * trl.notes["gradient_accumulation_steps"] == 2 * group_size
    check_agreement(trl, our_update(case, tmp_path / "ours.safetensors"), tmp_path)
