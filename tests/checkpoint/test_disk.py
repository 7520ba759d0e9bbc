from __future__ import annotations

import os
import zlib
from pathlib import Path

import pytest

from megatron_vcr1.checkpoint.disk import (
    WRITE_BYTES,
    Checksum,
    checksum_of,
    create_file,
    file_named_in_errors,
    publish,
    write_durably,
)


def test_large_writes_are_split_and_checksummed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(2 * WRITE_BYTES + 12345)
    checksum = Checksum()
    with create_file(tmp_path / "file", checksum) as file:
        file.write(b"head")
        file.write(content)
    assert (tmp_path / "file").read_bytes() == b"head" + content
    expected = Checksum(4 + len(content), zlib.crc32(b"head" + content))
    assert checksum == checksum_of(tmp_path / "file") == expected


def test_an_error_of_a_read_or_write_names_its_file() -> None:
    message = r"^\[Errno 28\] No space left on device: 'folder/file'$"
    with pytest.raises(OSError, match=message), file_named_in_errors(Path("folder/file")):
        raise OSError(28, "No space left on device")


def test_existing_files_are_not_overwritten(tmp_path: Path) -> None:
    write_durably(tmp_path / "file", b"old")
    with pytest.raises(FileExistsError):
        create_file(tmp_path / "file")
    with pytest.raises(FileExistsError):
        write_durably(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def test_published_directories_are_durable(tmp_path: Path, not_durable: list[str]) -> None:
    (tmp_path / "partial/inner").mkdir(parents=True)
    write_durably(tmp_path / "partial/inner/file", b"content")
    publish(tmp_path / "partial", tmp_path / "final")
    assert (tmp_path / "final/inner/file").read_bytes() == b"content"
    assert not not_durable


def test_the_durability_check_notices_a_missing_fsync(tmp_path: Path, not_durable: list[str]) -> None:
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial/file").write_bytes(b"content")
    publish(tmp_path / "partial", tmp_path / "final")
    assert not_durable == [str(tmp_path / "partial/file")]
