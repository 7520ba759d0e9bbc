from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vcr1.data.importers.files import read_csv, read_json, read_lines, read_table
from megatron_vcr1.errors import UserError
from megatron_vcr1.types import (
    GroundingTarget,
    Interval,
    QualityTarget,
    VideoSample,
)
from tests.data.importers.importing import run, write


def test_huggingface_tables_of_every_file_type_give_the_same_samples(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [
        {
            "id": "a",
            "task": "temporal_grounding",
            "video": "a.mp4",
            "duration_s": 9.0,
            "query": "a dog barks",
            "target": {"interval": [1.0, 2.0], "label": None},
        },
        {
            "id": "b",
            "task": "quality",
            "video": "b.mp4",
            "duration_s": None,
            "query": "how good?",
            "target": {"interval": None, "label": "low quality"},
        },
    ]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "rows.parquet")
    saved = tmp_path / "saved"
    saved.mkdir()
    with pyarrow.ipc.new_stream(saved / "data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table)
    lines = write(tmp_path / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    expected = [
        VideoSample("a", "a.mp4", GroundingTarget(Interval(1, 2)), "a dog barks", duration_s=9.0),
        VideoSample("b", "b.mp4", QualityTarget("low quality"), "how good?"),
    ]
    for source in (tmp_path / "rows.parquet", saved, lines, write(tmp_path / "rows.json", rows)):
        assert run("huggingface", source)[0] == expected, source


def test_unicode_line_separators_do_not_split_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"a": "x\u2028y"}\n\n{"a": "z"}\n')
    assert [row["a"] for row in read_table(path)] == ["x\u2028y", "z"]
    assert len(read_lines(path)) == 2


def test_csv_rows_are_keyed_by_the_header(tmp_path: Path) -> None:
    assert read_csv(write(tmp_path / "a.csv", 'id,text\n1,"a, b"\n')) == [{"id": "1", "text": "a, b"}]


def test_unreadable_files_are_user_errors_that_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x81")
    (tmp_path / "empty").mkdir()
    broken = write(tmp_path / "broken.jsonl", '{"a": 1}\n{"a"\n')
    for read, path, message in (
        (read_json, tmp_path / "binary.json", r"binary\.json: cannot be read as JSON"),
        (read_csv, tmp_path / "gone.csv", r"gone\.csv: cannot be read as CSV"),
        (read_lines, tmp_path / "gone.txt", r"gone\.txt: cannot be read as text"),
        (read_table, broken, r"broken\.jsonl: row 2 is not JSON"),
        (read_table, tmp_path / "rows.txt", r"expected a \.json, \.jsonl, \.parquet or \.arrow file"),
        (read_table, tmp_path / "empty", "the folder has no .parquet, .arrow or .jsonl file"),
    ):
        with pytest.raises(UserError, match=message):
            list(read(path))
