from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1 import text_files
from megatron_vcr1.data import manifest
from megatron_vcr1.data.manifest import BadRow, ManifestError, read_manifest, scan_manifest, write_manifest
from megatron_vcr1.data.rows import sample_from_row
from megatron_vcr1.types import Sample
from tests.data.manifest_rows import ROWS, changed, write_rows


def test_a_written_manifest_is_read_back(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "in.jsonl", ROWS)
    samples = read_manifest(manifest)
    assert samples[0].media[0].path == str(tmp_path / "a.mp4")
    assert samples[1].media[0].path == (str(tmp_path / "f/1.jpg"), str(tmp_path / "f/2.jpg"))
    assert samples[2].media[0].path == "s3://bucket/b.mp4"
    write_manifest(tmp_path / "out.jsonl", samples)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert written == ROWS  # videos below the manifest's folder have relative paths again
    write_manifest(tmp_path / "elsewhere" / "out.jsonl", samples)
    assert read_manifest(tmp_path / "elsewhere" / "out.jsonl") == samples


def test_a_failed_write_leaves_the_old_manifest(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", ROWS)

    def broken() -> Any:
        yield sample_from_row(ROWS[0])
        raise RuntimeError("no more rows")

    with pytest.raises(RuntimeError):
        write_manifest(manifest, broken())
    assert len(read_manifest(manifest)) == len(ROWS)


def test_the_error_names_file_and_line_of_every_bad_row(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", [ROWS[0], changed(1, query=" "), ROWS[0], ROWS[2]])
    with manifest.open("a") as file:
        file.write('\n{"id": \n')
    with pytest.raises(ManifestError) as error:
        read_manifest(manifest)
    lines = str(error.value).splitlines()
    assert lines[0] == f"{manifest}: 3 bad rows"
    assert lines[1].startswith(f"  {manifest}, line 2: query is empty; tracking needs one")
    assert lines[2] == f"  {manifest}, line 3: key 'id': 'grounding' is already on line 1; make ids unique"
    assert lines[3].startswith(f"  {manifest}, line 6: not JSON")


def test_scanning_continues_after_bad_rows(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", [changed(0, task="x"), ROWS[1]])
    bad, good = scan_manifest(manifest)
    assert isinstance(bad, BadRow) and (bad.line, bad.id) == (1, "grounding")
    assert isinstance(good, Sample) and good.id == "tracking"


@pytest.mark.parametrize("line", ["[" * 100_000, '{"id": ' + "1" * 5000 + "}"], ids=["brackets", "digits"])
def test_json_that_python_refuses_is_a_bad_row(tmp_path: Path, line: str) -> None:
    (tmp_path / "m.jsonl").write_text(f"{line}\n{json.dumps(ROWS[1])}\n")
    bad, good = scan_manifest(tmp_path / "m.jsonl")
    assert isinstance(bad, BadRow) and bad.line == 1 and "JSON that Python cannot read" in bad.problem
    assert isinstance(good, Sample)


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", ROWS)
    manifest.write_text(manifest.read_text(), encoding="utf-8-sig")
    assert len(read_manifest(manifest)) == len(ROWS)


def test_many_bad_rows_are_counted_and_missing_or_empty_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"25 bad rows(.|\n)*and 5 more: see `vcr1 data check"):
        read_manifest(write_rows(tmp_path / "m.jsonl", [{}] * 25))
    with pytest.raises(ManifestError, match="no rows"):
        read_manifest(write_rows(tmp_path / "empty.jsonl", []))
    with pytest.raises(ManifestError, match=r"absent\.jsonl: no such manifest; `vcr1 data import` makes"):
        read_manifest(tmp_path / "absent.jsonl")
    (tmp_path / "video.jsonl").write_bytes(b"\x00\xff\xfe\x81")
    with pytest.raises(ManifestError, match="UTF-8"):
        read_manifest(tmp_path / "video.jsonl")


def test_hostile_lines_are_bad_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_LINE_CHARACTERS", 200_000)
    monkeypatch.setattr(manifest, "MAX_LINE_CHARACTERS", 200_000)
    path = tmp_path / "m.jsonl"
    path.write_text("\n".join(["[" * 100_000, "9" * 5_000, "\0", '"' + "x" * 300_000, '{"id": "\\ud800"}']) + "\n")
    rows = [row for row in scan_manifest(path) if isinstance(row, BadRow)]
    assert [row.line for row in rows] == [1, 2, 3, 4, 5]
    assert "longer than 200000 characters" in rows[3].problem


def test_a_fifo_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ManifestError, match="not a regular file"):
        read_manifest(tmp_path / "pipe.jsonl")
