from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vcr1.checkpoint.torch_dist import write_metadata
from megatron_vcr1.checkpoint.training_tensors import (
    copy_lazily,
    copy_to_host,
    load_tensors,
    slices_to_write,
    write_rank_file,
)
from megatron_vcr1.errors import UserError
from tests.checkpoint.toy_run import ToyRun
from tests.model import tiny

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.fixture
def run(tmp_path: Path) -> ToyRun:
    """A run after one step."""
    tiny.create("qwen2_vl", tmp_path / "model")
    run = ToyRun(tmp_path / "model", tmp_path / "checkpoints", {})
    run.train(1)
    return run


def test_copies_do_not_change_with_training(run: ToyRun) -> None:
    slices = slices_to_write(run.learner.model, run.learner.optimizer)
    lazy, copies = list(copy_lazily(slices)), copy_to_host(slices)
    run.train(1)
    after = copy_to_host(slices)
    for (_, _, first), (_, _, second) in zip(lazy, copies, strict=True):
        assert torch.equal(first, second)
    assert any(not torch.equal(copy[2], changed[2]) for copy, changed in zip(copies, after, strict=True))


def test_tensors_are_written_and_loaded(run: ToyRun, tmp_path: Path) -> None:
    model, optimizer = run.learner.model, run.learner.optimizer
    slices = slices_to_write(model, optimizer)
    keys = [(part.key, part.offsets, part.start) for part in slices]
    assert len(keys) == len(set(keys))
    megatron_dir = tmp_path / "megatron"
    megatron_dir.mkdir()
    file = write_rank_file(megatron_dir, slices, copy_lazily(slices))
    assert file.checksum.num_bytes == (megatron_dir / file.name).stat().st_size
    write_metadata(megatron_dir, file.specs, file.chunks)
    expected = copy_to_host(slices)
    run.train(1)
    load_tensors(megatron_dir, model, optimizer)
    for (key, _, before), (_, _, loaded) in zip(expected, copy_to_host(slices), strict=True):
        assert torch.equal(before, loaded), key


def test_weights_of_another_dtype_are_refused(run: ToyRun, tmp_path: Path) -> None:
    slices = slices_to_write(run.learner.model, run.learner.optimizer)
    (tmp_path / "megatron").mkdir()
    file = write_rank_file(tmp_path / "megatron", slices, copy_lazily(slices))
    write_metadata(tmp_path / "megatron", file.specs, file.chunks)
    other = ToyRun(tmp_path / "model", tmp_path / "other", {"model": {"dtype": "bfloat16"}})
    with pytest.raises(UserError, match="is float32 in the checkpoint, but bfloat16 in this run; resume with"):
        load_tensors(tmp_path / "megatron", other.learner.model, other.learner.optimizer)
