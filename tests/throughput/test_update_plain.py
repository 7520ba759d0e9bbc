"""The plain transformers update has our loss and gradients."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_vcr1.throughput.update_case import UpdateCase
from megatron_vcr1.throughput.update_plain import PlainUpdate
from tests.throughput.agreement import check_agreement

pytestmark = pytest.mark.xdist_group("gloo")


@pytest.mark.parametrize("full_logits", [True, False])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_loss_and_gradients_equal_ours(
    case: UpdateCase, ours: tuple[float, Path], tmp_path: Path, full_logits: bool, recompute: str
) -> None:
    plain = PlainUpdate(dataclasses.replace(case, recompute=recompute), full_logits=full_logits)
    check_agreement(plain, ours, tmp_path)
