from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.data.importers.files import (
    MalformedRow,
    convert_rows,
    id_of_file,
    read_json_list,
    read_json_object,
    read_lines,
    read_table,
)
from megatron_vcr1.data.importers.own import ColumnMap
from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import GroundingTarget, QualityTarget
from megatron_vcr1.types import Interval, Sample, Video
from tests.data.importers.importing import run, write

SPAN_COLUMNS = ColumnMap({"target.start": "start", "target.end": "end"})


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
        Sample("a", (Video("a.mp4", 9.0),), GroundingTarget(Interval(1, 2)), "a dog barks"),
        Sample("b", (Video("b.mp4"),), QualityTarget("low quality"), "how good?"),
    ]
    for source in (tmp_path / "rows.parquet", saved, lines, write(tmp_path / "rows.json", rows)):
        assert run("huggingface", source)[0] == expected, source


def test_unicode_line_separators_do_not_split_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"a": "x\u2028y"}\n\n{"a": "z"}\n')
    assert [row["a"] for _, row in read_table(path)] == ["x\u2028y", "z"]
    assert len(read_lines(path)) == 2


@pytest.mark.parametrize("separator", [";", "\t"])
def test_csv_of_spreadsheets_in_other_languages_is_read(tmp_path: Path, separator: str) -> None:
    lines = "\ufeffid;text;x,y\r\n1;a, b;\r\n2;c;3\r\n".replace(";", separator)
    rows = [row for _, row in read_table(write(tmp_path / "a.csv", lines))]
    assert rows == [{"id": "1", "text": "a, b", "x,y": ""}, {"id": "2", "text": "c", "x,y": "3"}]


def test_csv_rows_are_keyed_by_the_header(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'id,text\n1,"a, b"\n2\n')
    assert [row for _, row in read_table(path)] == [{"id": "1", "text": "a, b"}, {"id": "2", "text": None}]


def test_a_text_with_a_comma_outside_of_quotes_is_not_cut(tmp_path: Path) -> None:
    content = "video,start,end,query\na.mp4,1,5,a man walks\nb.mp4,1,5,a man walks, then runs\n"
    samples, report = run("own", write(tmp_path / "a.csv", content), task="temporal_grounding", columns=SPAN_COLUMNS)
    assert [sample.query for sample in samples] == ["a man walks"]
    (issue,) = report.issues
    assert (issue.row_id, issue.problem) == ("a.csv, row 2", "invalid_row") and "1 more cells" in issue.detail


def test_a_quotation_mark_that_is_never_closed_does_not_swallow_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'id,text\n1,a\n2,"b\n3,c\n')
    with pytest.raises(UserError, match=r"a\.csv, after line 2: cannot be read as CSV"):
        list(read_table(path))


def test_several_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    message = r"rows\.\w+: 2 columns are named 'start'"
    with pytest.raises(UserError, match=message):
        list(read_table(write(tmp_path / "rows.csv", "id,start,start\n1,2,3\n")))
    unnamed = write(tmp_path / "rows.csv", "id,start,,\n1,2,,\n")  # as a spreadsheet saves it
    assert [row["start"] for _, row in read_table(unnamed)] == ["2"]
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table([[1], [2]], names=["start", "start"])
    with pyarrow.ipc.new_stream(tmp_path / "rows.arrow", table.schema) as stream:
        stream.write_table(table)
    with pytest.raises(UserError, match=message):
        list(read_table(tmp_path / "rows.arrow"))


def test_unreadable_files_are_user_errors_that_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x81")
    (tmp_path / "empty").mkdir()
    for read, path, message in (
        (read_json_list, tmp_path / "binary.json", r"binary\.json: not UTF-8 text"),
        (read_table, tmp_path / "gone.csv", r"gone\.csv: cannot be read"),
        (read_lines, tmp_path / "gone.txt", r"gone\.txt: cannot be read"),
        (read_table, tmp_path / "rows.txt", r"expected a \.json, \.jsonl, \.csv, \.parquet or \.arrow file"),
        (read_table, tmp_path / "empty", "the folder has no .parquet, .arrow or .jsonl file"),
    ):
        with pytest.raises(UserError, match=message):
            list(read(path))


def test_a_line_that_is_not_json_does_not_end_the_file(tmp_path: Path) -> None:
    deep = "[" * 100_000
    path = write(tmp_path / "rows.jsonl", f'{{"a": 1}}\n{{"a"\n{deep}\n{"9" * 5000}\n{{"a": 2}}\n')
    rows = dict(read_table(path))
    assert [place for place, row in rows.items() if isinstance(row, MalformedRow)] == [
        f"rows.jsonl, row {number}" for number in (2, 3, 4)
    ]
    assert [row["a"] for row in rows.values() if isinstance(row, dict)] == [1, 2]


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_json_list, {"a": 1}, "expected a JSON list of rows, got an object"),
        (read_json_list, "3", "expected a JSON list of rows, got 3"),
        (read_json_object, [1], "expected a JSON object with one entry for each video, got a list"),
        (read_json_object, "null", "expected a JSON object with one entry for each video, got None"),
    ],
)
def test_json_of_another_shape_is_a_user_error(tmp_path: Path, read: Any, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"a\.json: {message}"):
        read(write(tmp_path / "a.json", content))


def test_a_repeated_key_does_not_hide_the_entry_before_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.json: the key 'v1' occurs more than once"):
        read_json_object(write(tmp_path / "a.json", '{"v1": {"duration": 9}, "v2": {}, "v1": {"duration": 8}}'))


def test_json_lines_under_the_name_of_json_are_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.json: not JSON: Extra data.*rename it to \.jsonl"):
        read_json_list(write(tmp_path / "a.json", '{"a": 1}\n{"a": 2}\n'))


@pytest.mark.parametrize(
    ("path", "name"),
    [("a/b.mp4", "a_b"), ("./b.m2ts", "b"), ("/b.3gp", "b"), ("b_60.0_210.5", "b_60.0_210.5"), ("b_1.5.mp4", "b_1.5")],
)
def test_ids_keep_the_folders_and_the_numbers_of_a_name(path: str, name: str) -> None:
    assert id_of_file(path) == name


def test_malformed_entries_are_named_by_their_id_or_their_place() -> None:
    entries = [("row 1", {"id": "a", "n": 1}), ("row 2", {"id": "b"}), ("row 3", 5), ("row 4", {"id": "d", "n": None})]
    rows = list(convert_rows(entries, lambda entry: {"n": entry["n"] + 1}, lambda entry: entry["id"]))
    assert rows[0] == {"n": 2}
    assert [row.row_id for row in rows[1:] if isinstance(row, MalformedRow)] == ["b", "row 3", "d"]


def test_hidden_files_of_a_folder_are_ignored(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"a": 1}\n')
    (tmp_path / "._a.jsonl").write_bytes(b"\0\5\x16\7 metadata of macOS")
    assert [row for _, row in read_table(tmp_path)] == [{"a": 1}]


def test_a_fifo_is_refused(tmp_path: Path) -> None:
    for suffix in ("json", "jsonl", "parquet"):
        pytest.importorskip("pyarrow")
        os.mkfifo(tmp_path / f"pipe.{suffix}")
        with pytest.raises(UserError, match="not a regular file"):
            list(read_table(tmp_path / f"pipe.{suffix}"))
