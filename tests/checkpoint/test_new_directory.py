from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vcr1.checkpoint.disk import create_file
from megatron_vcr1.checkpoint.hf_export import export_checkpoint
from megatron_vcr1.checkpoint.hf_import import import_checkpoint
from megatron_vcr1.checkpoint.new_directory import new_directory
from megatron_vcr1.errors import UserError
from tests.checkpoint.hf_dirs import file_names


@pytest.mark.parametrize("convert", [import_checkpoint, export_checkpoint])
def test_content_is_durable_before_the_directory_gets_its_name(
    hf_dir: Path, imported_dir: Path, tmp_path: Path, not_durable: list[str], convert: Any
) -> None:
    convert(hf_dir if convert is import_checkpoint else imported_dir, tmp_path / "out")
    assert not not_durable


@pytest.mark.parametrize("convert", [import_checkpoint, export_checkpoint])
def test_an_existing_directory_is_refused_and_left_alone(
    hf_dir: Path, imported_dir: Path, tmp_path: Path, convert: Any
) -> None:
    source = hf_dir if convert is import_checkpoint else imported_dir
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(UserError, match=r"out: exists \(Directory not empty\); give the path of a new directory"):
        convert(source, out)
    assert file_names(out) == ["precious"]
    with pytest.raises(UserError, match=r"none: no such directory; create it first"):
        convert(source, tmp_path / "none/out")


@pytest.mark.parametrize("convert", [import_checkpoint, export_checkpoint])
def test_an_empty_directory_is_filled(hf_dir: Path, imported_dir: Path, tmp_path: Path, convert: Any) -> None:
    (tmp_path / "out").mkdir()
    convert(hf_dir if convert is import_checkpoint else imported_dir, tmp_path / "out")
    assert "config.json" in file_names(tmp_path / "out")


@pytest.mark.parametrize("convert", [import_checkpoint, export_checkpoint])
def test_too_little_disk_space_is_reported_before_anything_is_written(
    hf_dir: Path, imported_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, convert: Any
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"disk full: 0\.07 GB needed, 0\.00 GB free"):
        convert(hf_dir if convert is import_checkpoint else imported_dir, tmp_path / "out")
    assert file_names(tmp_path) == ["hf", "imported"]


def test_an_error_removes_the_directory(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_directory(tmp_path / "out", 0) as partial:
        create_file(partial / "file").close()
        raise KeyError("a tensor")
    assert file_names(tmp_path) == []


def test_symbolic_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/empty").mkdir()
    for name in ("empty", "new"):
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        with new_directory(tmp_path / name, 0) as partial:
            assert partial.parent == tmp_path / "disk"
            create_file(partial / "file").close()
        assert (tmp_path / name).is_symlink()
        assert [path.name for path in (tmp_path / "disk" / name).iterdir()] == ["file"]


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    monkeypatch.setattr(Path, "rmdir", busy)  # as for a mount point
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(UserError, match=r"out: exists \(Device or resource busy\); give the path of a new directory"),
        new_directory(tmp_path / "out", 0),
    ):
        raise AssertionError("the work would be lost")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_possible_leftovers_are_reported_if_directories_cannot_be_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(fcntl, "flock", no_locks)  # as for a directory on NFS
    (tmp_path / f".out.partial-{os.getpid()}").mkdir()
    with caplog.at_level(logging.WARNING), new_directory(tmp_path / "out", 0):
        pass
    assert f".out.partial-{os.getpid()}: not removed. Either another process is writing it, or" in caplog.text
    assert (tmp_path / "out").is_dir()
