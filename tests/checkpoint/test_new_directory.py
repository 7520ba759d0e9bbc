from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.checkpoint.disk import create
from megatron_vcr1.checkpoint.hf_export import export_checkpoint
from megatron_vcr1.checkpoint.hf_import import import_checkpoint
from megatron_vcr1.checkpoint.new_directory import new_directory
from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.collectives import run_on_every_rank
from tests.gloo import GlooPool


class _TwoPartError(Exception):
    """Cannot be pickled: its parts are not the arguments of its base."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file}: {reason}")


FAILURES: dict[str, Callable[[], Exception]] = {
    "user": lambda: UserError("no such model"),
    "disk": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "ours": lambda: KeyError("a tensor"),
    "a library's": lambda: _TwoPartError("a.safetensors", "bad"),
}


def _meet_failures() -> list[tuple[str, str]]:
    """Ranks 1 and 3 fail in each way, one after another; the errors that this rank gets."""
    mesh.initialize(ParallelSection())
    caught = []
    for failure in FAILURES.values():

        def work(failure: Callable[[], Exception] = failure) -> None:
            if mesh.rank() == 1:
                raise failure()
            if mesh.rank() == 3:
                raise ValueError("later")

        try:
            run_on_every_rank(work)
        except Exception as error:
            caught.append((type(error).__name__, str(error)))
    return caught


@pytest.mark.xdist_group("gloo")
def test_what_fails_on_one_rank_fails_on_all_of_them(gloo_pool: GlooPool) -> None:
    answers = gloo_pool.run(_meet_failures)
    expected = [
        ("UserError", "no such model"),
        ("OSError", "[Errno 28] No space left on device"),
        ("KeyError", "'a tensor'"),
    ]
    assert [answer[:3] for answer in answers] == [expected] * 4
    assert answers[1][3] == ("_TwoPartError", "a.safetensors: bad")
    assert [answers[other][3] for other in (0, 2, 3)] == [("RuntimeError", "_TwoPartError: a.safetensors: bad")] * 3


@pytest.mark.parametrize("convert", [import_checkpoint, export_checkpoint])
def test_everything_is_on_the_disk_before_it_gets_its_name(
    hf_dir: Path, imported_dir: Path, tmp_path: Path, not_on_disk: list[str], convert: Any
) -> None:
    convert(hf_dir if convert is import_checkpoint else imported_dir, tmp_path / "out")
    assert not not_on_disk


def test_a_link_is_followed_to_the_directory_to_be(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/empty").mkdir()
    for name in ("empty", "new"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        with new_directory(tmp_path / name, 0) as partial:
            assert partial.parent == tmp_path / "disk"
            create(partial / "file").close()
        assert (tmp_path / name).is_symlink()
        assert [path.name for path in (tmp_path / "disk" / name).iterdir()] == ["file"]


def test_a_name_that_cannot_be_taken_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr(Path, "rmdir", busy)  # as of a mount point
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(UserError, match=r"out: exists \(Device or resource busy\); name a new directory"),
        new_directory(tmp_path / "out", 0),
    ):
        raise AssertionError("work would be lost")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_may_be_left_over_is_named_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", no_locks)  # as of a directory on NFS
    (tmp_path / f".out.partial-{os.getpid()}").mkdir()
    with caplog.at_level(logging.WARNING), new_directory(tmp_path / "out", 0):
        pass
    assert f".out.partial-{os.getpid()}: being written by another process, or left by one" in caplog.text
    assert (tmp_path / "out").is_dir()
