from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

import pytest

from megatron_vcr1.checkpoint import step_dirs
from megatron_vcr1.checkpoint.step_dirs import (
    create_partial,
    remove_leftovers,
    remove_old,
    replace_directory,
    saved_steps,
    step_dir,
)


def _create(directory: Path, *steps: int) -> None:
    for step in steps:
        step_dir(directory, step).mkdir()
        (step_dir(directory, step) / "file").write_text(str(step))


def test_only_complete_checkpoints_are_listed(tmp_path: Path) -> None:
    _create(tmp_path, 10, 9)
    create_partial(tmp_path, 11, 0)
    (tmp_path / "step_8.damaged").mkdir()
    (tmp_path / "step_7").write_text("not a directory")
    assert saved_steps(tmp_path) == [9, 10]


@pytest.mark.parametrize("keep_every, kept", [(None, [7, 8]), (3, [3, 6, 7, 8])])
def test_old_checkpoints_are_removed(tmp_path: Path, keep_every: int | None, kept: list[int]) -> None:
    _create(tmp_path, *range(1, 9))
    remove_old(tmp_path, keep_last=2, keep_every=keep_every)
    assert sorted(os.listdir(tmp_path)) == [f"step_{step}" for step in kept]


def test_leftovers_of_a_dead_run_are_removed(tmp_path: Path) -> None:
    _create(tmp_path, 1)
    create_partial(tmp_path, 2, 0)
    (tmp_path / ".step_0.removed-0a1b").mkdir()
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["step_1"]


def test_an_existing_directory_is_replaced(tmp_path: Path, not_durable: list[str]) -> None:
    _create(tmp_path, 1)
    partial = create_partial(tmp_path, 1, 0)
    replace_directory(partial, step_dir(tmp_path, 1))
    assert os.listdir(step_dir(tmp_path, 1)) == ["megatron"]
    assert os.listdir(tmp_path) == ["step_1"]
    assert not not_durable


def test_a_failed_removal_hides_the_checkpoint_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    _create(tmp_path, 1, 2)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(step_dirs.shutil, "rmtree", fail)
        remove_old(tmp_path, keep_last=1, keep_every=None)
    (hidden,) = tmp_path.glob(".step_1.removed-*")
    assert f"{hidden}: cannot be removed ([Errno 39] Directory not empty" in caplog.text
    assert saved_steps(tmp_path) == [2]
    remove_old(tmp_path, keep_last=1, keep_every=None)
    assert os.listdir(tmp_path) == ["step_2"]


def test_too_little_disk_space_is_an_error(tmp_path: Path) -> None:
    num_bytes = shutil.disk_usage(tmp_path).total
    with pytest.raises(OSError, match="GB needed") as raised:
        create_partial(tmp_path, 1, num_bytes)
    assert raised.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []
