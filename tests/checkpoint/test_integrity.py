from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vcr1.checkpoint.disk import Checksum
from megatron_vcr1.checkpoint.integrity import check_files, write_checksums
from megatron_vcr1.errors import UserError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(b"aaaa")
    (tmp_path / "inner/b").write_bytes(b"bbbb")
    write_checksums(tmp_path, {})
    return tmp_path


def test_intact_files_pass(directory: Path) -> None:
    check_files(directory)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"bbb", "4 bytes were written, it has 3"),
        (b"bbbc", "CRC-32 differs"),
        (None, "4 bytes were written, it is missing"),
    ],
)
def test_damaged_files_are_named(directory: Path, content: bytes | None, message: str) -> None:
    if content is None:
        (directory / "inner/b").unlink()
    else:
        (directory / "inner/b").write_bytes(content)
    with pytest.raises(UserError, match=f"inner/b: .*{message}"):
        check_files(directory)


def test_each_share_reads_different_files(directory: Path) -> None:
    (directory / "inner/b").write_bytes(b"bbbc")  # the second file in sorted order
    check_files(directory, share=0, num_shares=2)
    with pytest.raises(UserError, match="CRC-32 differs"):
        check_files(directory, share=1, num_shares=2)


def test_known_checksums_are_not_computed_again(directory: Path) -> None:
    (directory / "checksums.json").unlink()
    write_checksums(directory, {"a": Checksum(4, 123)})
    with pytest.raises(UserError, match="a: the content is not what was written"):
        check_files(directory)


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": {"size": 1}}'])
def test_damaged_checksums_are_named(directory: Path, text: str) -> None:
    (directory / "checksums.json").write_text(text)
    with pytest.raises(UserError, match=r"checksums\.json: damaged or missing"):
        check_files(directory)
