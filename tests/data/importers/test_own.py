from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.data.importers.cleaning import VideoFolder
from megatron_vcr1.data.importers.own import ColumnMap, _target
from megatron_vcr1.data.rows import row_from_sample
from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import find_task
from megatron_vcr1.tasks.row_fields import INTERVAL, TEXT, TargetField
from megatron_vcr1.types import Sample
from tests.data.importers.importing import issues, run, write
from tests.data.manifest_rows import ROWS
from tests.data.video_clips import write_clip

EVENTS = [
    {"file": "a.mp4", "sentence": "a dog barks", "from": 0.5, "to": 1.2},
    {"file": "b/a.mp4", "sentence": "a cat runs", "from": 0.0, "to": 0.4},
    {"file": "a.mp4", "sentence": "it rains", "from": 1.0, "to": 9.0},
]
EVENT_COLUMNS = ["file=video,sentence=query", "from=target.start", "to=target.end"]


def own(path: Path, task: str | None, *columns: str, **options: Any) -> Any:
    return run("own", path, task=task, columns=ColumnMap.parse(columns), **options)


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows in the format of the path's suffix."""
    if path.suffix == ".json":
        return write(path, rows)
    if path.suffix == ".jsonl":
        return write(path, "".join(json.dumps(row) + "\n" for row in rows))
    if path.suffix == ".csv":
        header = list(rows[0])
        texts = [[row[key] if isinstance(row[key], str) else json.dumps(row[key]) for key in header] for row in rows]
        quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in line) for line in [header, *texts]]
        return write(path, "\r\n".join(quoted) + "\r\n")
    table = pytest.importorskip("pyarrow").Table.from_pylist(rows)
    pytest.importorskip("pyarrow.parquet").write_table(table, path)
    return path


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_columns_are_mapped_by_name_and_ids_are_made(tmp_path: Path, suffix: str) -> None:
    samples, report = own(write_table(tmp_path / f"a.{suffix}", EVENTS), "temporal_grounding", *EVENT_COLUMNS)
    assert [(sample.id, sample.media[0].path, sample.query) for sample in samples] == [
        ("a_0", "a.mp4", "a dog barks"),
        ("b_a_0", "b/a.mp4", "a cat runs"),
        ("a_1", "a.mp4", "it rains"),
    ]
    assert [(span.start_s, span.end_s) for sample in samples for span in sample.intervals] == [
        (0.5, 1.2),
        (0.0, 0.4),
        (1.0, 9.0),
    ]
    assert not report.issues and samples[0].duration_s is None


def test_videos_are_measured_and_spans_are_cut(tmp_path: Path) -> None:
    (tmp_path / "clips/b").mkdir(parents=True)
    write_clip(tmp_path / "clips/a.mp4")  # 1.6 s
    (tmp_path / "clips/b/a.mp4").write_text("no video")
    annotations = write_table(tmp_path / "a.json", EVENTS)
    samples, report = own(
        annotations, "temporal_grounding", *EVENT_COLUMNS, videos=VideoFolder(str(tmp_path / "clips"))
    )
    assert [(sample.id, sample.duration_s, sample.intervals[0].end_s) for sample in samples] == [
        ("a_0", 1.6, 1.2),
        ("a_1", 1.6, 1.6),
    ]
    assert issues(report) == [("b_a_0", "unreadable_video", "skipped"), ("a_1", "span_past_end", "repaired")]


@pytest.mark.parametrize("row", [row for row in ROWS if row["id"] != "text"], ids=lambda row: str(row["id"]))
@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_rows_of_every_task_can_be_read_from_flat_columns(tmp_path: Path, row: dict[str, Any], suffix: str) -> None:
    """Every key of a row has a column; in CSV, numbers and lists are texts."""
    flat = {f"c_{key}": value for key, value in row.items() if key != "target" and value is not None}
    flat |= {f"t_{key}": value for key, value in row["target"].items()}
    columns = [f"{name}={name[2:] if name.startswith('c_') else 'target.' + name[2:]}" for name in flat]
    (sample,), _ = own(write_table(tmp_path / f"a.{suffix}", [flat]), None, *columns)
    assert isinstance(sample, Sample)
    written = row_from_sample(sample)
    assert {key: written[key] for key in row if row[key] not in (None, "")} == {
        key: value for key, value in row.items() if value not in (None, "")
    }


def test_options_may_be_columns_and_the_answer_a_text(tmp_path: Path) -> None:
    rows = [{"video": "a.mp4", "q": "which?", "a0": "cat", "a1": "dog", "a2": "", "right": "dog", "n": 3}]
    columns = ("q=query", "a0=options.0,a1=options.1,a2=options.2", "right=target.answer")
    (sample,), _ = own(write_table(tmp_path / "a.csv", rows), "multiple_choice_qa", *columns)
    assert (sample.options, sample.target.choice) == (("cat", "dog"), "B")
    columns = (*columns, "start=target.start", "end=target.end")
    (sample,), _ = own(write_table(tmp_path / "a.json", [rows[0] | {"start": 1, "end": 2}]), "grounded_qa", *columns)
    assert [(span.start_s, span.end_s) for span in sample.target.intervals] == [(1.0, 2.0)]


def test_nested_columns_and_columns_with_the_name_of_a_key(tmp_path: Path) -> None:
    rows = [{"id": 7, "video": "a.mp4", "query": "x", "event": {"span": [1, 2]}, "extra": "is ignored"}]
    (sample,), _ = own(write(tmp_path / "a.json", rows), "temporal_grounding", "event.span=target.interval")
    assert (sample.id, sample.query, sample.intervals[0].end_s) == ("7", "x", 2.0)


@pytest.mark.parametrize(
    ("task", "columns", "message"),
    [
        (
            "temporal_grounding",
            ["file=video", "sentense=query"],
            "sentense=query: .*a.json has the columns file, sentence, from, to; did you mean sentence?",
        ),
        (
            "temporal_grounding",
            ["file=video", "from=target.start"],
            "no column .* key query: add COLUMN=query",
        ),
        ("temporal_grounding", ["sentence=query"], "key video: .* the columns are file, sentence, from, to"),
        ("temporal_grounding", ["file=video", "sentence=query"], "key target: .*for example start=target.start"),
        ("multiple_choice_qa", ["file=video", "sentence=query", "to=target.choice"], "for the key options"),
        (None, EVENT_COLUMNS, "key task: add COLUMN=task to --columns .or give --task"),
        ("grounding", EVENT_COLUMNS, '"grounding" is not one of temporal_grounding, tracking'),
        ("temporal_grounding", ["file"], "--columns file: write COLUMN=KEY"),
        ("temporal_grounding", ["file=video", "from=video"], "file=video is given, too"),
        ("temporal_grounding", [*EVENT_COLUMNS, "to=length"], "to=length: there is no such key; use one of id, task"),
    ],
)
def test_wrong_columns_are_user_errors(tmp_path: Path, task: str | None, columns: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        own(write(tmp_path / "a.json", EVENTS), task, *columns)


def test_cells_that_are_missing_or_of_another_type_skip_their_row(tmp_path: Path) -> None:
    rows = [
        EVENTS[0],
        {**EVENTS[0], "from": "soon"},
        {**EVENTS[0], "to": None},
        {**EVENTS[0], "file": ""},
        [],
        EVENTS[0],
    ]
    samples, report = own(write(tmp_path / "a.json", rows), "temporal_grounding", *EVENT_COLUMNS)
    assert [sample.id for sample in samples] == ["a_0", "a_3"]
    assert {(problem, action) for _, problem, action in issues(report)} == {("invalid_row", "skipped")}
    details = [issue.detail for issue in report.issues]
    assert "column 'from' holds 'soon', which is not a number" in details[0]
    assert "'target.end' is missing" in details[1] and "'video' is missing" in details[2]


def test_a_gap_between_options_skips_the_row(tmp_path: Path) -> None:
    row = {"id": "good", "video": "a.mp4", "query": "which?", "options.0": "cat", "options.1": "dog", "options.2": ""}
    rows = [
        row | {"target.choice": "B"},
        row | {"id": "gap", "options.1": "", "options.2": "dog", "target.choice": "C"},
    ]
    samples, report = own(write_table(tmp_path / "a.csv", rows), "multiple_choice_qa")
    assert [sample.options for sample in samples] == [("cat", "dog")]
    assert issues(report) == [("gap", "invalid_row", "skipped")]
    assert "options.1 is empty, but there is options.2" in report.issues[0].detail
    many = row | {f"options.{number}": "x" for number in range(8)} | {"target.choice": "A"}
    _, report = own(write_table(tmp_path / "a.csv", [many]), "multiple_choice_qa")
    assert "options: need 1 to 7, got 8" in report.issues[0].detail


def test_rows_of_text_alone_need_no_video(tmp_path: Path) -> None:
    rows = [
        {"query": "2 + 2?", "video": "", "v": 4},
        {"query": "half?", "video": "a.mp4", "v": 1},
        {"query": "3?", "v": 3},
    ]
    samples, _ = own(write(tmp_path / "a.json", rows), "numeric", "v=target.value")
    assert [(sample.id, len(sample.media)) for sample in samples] == [("row_0", 0), ("a_0", 1), ("row_1", 0)]
    (sample,), _ = own(write(tmp_path / "b.json", [{"id": "mine", "query": "3?", "v": 3}]), "numeric", "v=target.value")
    assert (sample.id, sample.media) == ("mine", ())


def test_a_target_may_be_json_in_a_cell(tmp_path: Path) -> None:
    row = {"video": "a.mp4", "query": "when?", "target": '{"interval": [1, 2]}'}
    rows = [row, row | {"target": "[1, 2]"}, row | {"target": "soon"}]
    (sample,), report = own(write_table(tmp_path / "a.csv", rows), "temporal_grounding", "target=target")
    assert (sample.intervals[0].start_s, sample.intervals[0].end_s) == (1, 2)
    assert "'target' holds '[1, 2]', which is not an object" in report.issues[0].detail
    assert "column 'target': not JSON" in report.issues[1].detail


def test_the_ends_of_a_span_are_refused_by_a_task_without_spans(tmp_path: Path) -> None:
    rows = [{"video": "a.mp4", "query": "how many?", "target.value": 3, "target.start": 1, "target.end": 2}]
    samples, report = own(write(tmp_path / "a.json", rows), "numeric")
    assert not samples and "key 'target.start' is unknown; a numeric target holds value" in report.issues[0].detail


def test_a_task_may_have_keys_named_start_and_end() -> None:
    fields = (
        TargetField("start", TEXT, "first word"),
        TargetField("end", TEXT, "last word"),
        TargetField("span", INTERVAL, ""),
    )
    task = type("Words", (type(find_task("quality")),), {"target_fields": fields})
    values = {"target.start": "a", "target.end": "b"}
    assert _target(values, object.__new__(task), {key: key for key in values}) == {"start": "a", "end": "b"}
