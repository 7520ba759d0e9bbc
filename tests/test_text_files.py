from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vcr1 import text_files
from megatron_vcr1.errors import UserError

READERS = (text_files.read_text, text_files.read_json, text_files.read_toml)
HOSTILE_JSON = {
    "deep list": "[" * 100_000,
    "deep object": '{"a":' * 100_000,
    "long integer": "9" * 5_000,
    "unterminated string": '"',
    "empty": "",
    "two values": "1 2",
}
HOSTILE_TOML = {
    "deep list": "a = " + "[" * 100_000,
    "long integer": "a = " + "9" * 5_000,
    "impossible date": "a = 2026-13-45",
    "no key": "= 1",
    "deep table": "[" + "a." * 50_000 + "a",
    "deep key": "a ." * 50_000 + "a = 1",
    "deep quoted key": '"a".' * 50_000 + "a = 1",
}


@pytest.mark.parametrize("text", HOSTILE_JSON.values(), ids=HOSTILE_JSON)
def test_hostile_json_is_a_user_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    start = time.process_time()
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        text_files.read_json(path)
    assert time.process_time() - start < 5


@pytest.mark.parametrize("text", HOSTILE_TOML.values(), ids=HOSTILE_TOML)
def test_hostile_toml_is_a_user_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"run\.toml: not (valid )?TOML"):
        text_files.read_toml(path)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfa = 1")
    assert text_files.read_json(tmp_path / "a.json") == {"a": 1}
    assert text_files.read_toml(tmp_path / "a.toml") == {"a": 1}


@pytest.mark.parametrize("read", READERS)
def test_a_fifo_is_refused_at_once(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(UserError, match="not a regular file"):
        read(path)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("path", ["/dev/zero", "/", "/no/such/file"])
def test_devices_folders_and_missing_files_are_user_errors(read: Callable[[str], object], path: str) -> None:
    with pytest.raises(UserError, match=path):
        read(path)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.json"
    path.write_bytes('"café"'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.json: not UTF-8 text .* at byte 4"):
        text_files.read_json(path)


def test_a_file_beyond_the_size_limit_is_refused_without_reading_it_whole(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(UserError, match=r"large\.json: larger than"):
        text_files.read_text(path, max_bytes=1000)


@pytest.mark.parametrize("value, kind", [([], "a list"), ("a", "a text"), (None, "null"), (1.5, "a number")])
def test_an_object_is_required(value: object, kind: str) -> None:
    with pytest.raises(UserError, match=f"a.json: expected a JSON object, got {kind}"):
        text_files.require_object(value, "a.json")
    assert text_files.require_object({"a": 1}, "a.json") == {"a": 1}


def test_lines_are_read_with_a_byte_order_mark_and_unicode_separators(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\ufeffa\u2028b\r\n\ufeffc\0d\n\nlast".encode())  # two files that were joined
    assert list(text_files.read_lines(path)) == ["a\u2028b\n", "c\0d\n", "\n", "last"]


def test_a_huge_line_is_cut_and_the_next_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE_CHARACTERS", 10)
    path = tmp_path / "rows.jsonl"
    path.write_text("x" * 35 + "\n" + "y" * 10 + "\n" + "z" * 11 + "\nok\n" + "w" * 40)
    lines = list(text_files.read_lines(path))
    assert [line[0] + str(len(line.rstrip())) for line in lines] == ["x11", "y10", "z11", "o2", "w11"]
    assert all(line.endswith("\n") for line in lines)


def test_lines_of_a_fifo_a_missing_file_and_binary_files_are_user_errors(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"a\n\xff\xfe\n")
    for name, message in (("pipe", "not a regular file"), ("gone", "cannot be read"), ("binary", "not UTF-8 text")):
        with pytest.raises(UserError, match=message):
            list(text_files.read_lines(tmp_path / name))
    assert list(text_files.read_lines(tmp_path / "binary", errors="replace")) == ["a\n", "\ufffd\ufffd\n"]
