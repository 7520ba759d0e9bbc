from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import GroundingTarget
from megatron_vcr1.types import Interval, Sample, Video
from tests.data.importers.importing import issues, run, write


def test_charades_text_reports_a_reason_for_every_repaired_or_skipped_row(charades: tuple[Path, Path]) -> None:
    samples, report = run("charades_sta", *charades)
    assert samples == [
        Sample("AAA_0", (Video("AAA.mp4", 10.0),), GroundingTarget(Interval(1, 4)), "a person sits ## down."),
        Sample("BBB_0", (Video("BBB.mp4", 10.5),), GroundingTarget(Interval(8, 10.5)), "past the end"),
    ]
    assert issues(report) == [
        ("AAA_1", "inverted_span", "skipped"),
        ("BBB_0", "span_past_end", "repaired"),
        ("BBB_1", "span_after_end", "skipped"),
        ("BBB_2", "empty_query", "skipped"),
    ]
    assert report.num_rows == 5 == report.num_samples + sum(issue.action == "skipped" for issue in report.issues)
    kept, report = run("charades_sta", *charades, keep_overruns=True)
    assert kept[1].intervals == (Interval(8, 12.5),)
    assert ("BBB_0", "span_past_end", "kept") in issues(report)


def test_a_byte_order_mark_is_ignored(charades: tuple[Path, Path], tmp_path: Path) -> None:
    expected = run("charades_sta", *charades)
    for path in charades:
        path.write_text(path.read_text(), encoding="utf-8-sig")
    assert run("charades_sta", *charades) == expected
    content = tmp_path / "train.json"
    content.write_text('{"AAA": {"duration": 10, "timestamps": [[1, 4]], "sentences": ["a"]}}', encoding="utf-8-sig")
    assert [sample.id for sample in run("activitynet", content)[0]] == ["AAA_0"]


def test_charades_json_gives_the_same_samples_as_text(charades: tuple[Path, Path], tmp_path: Path) -> None:
    content = {
        "AAA": {
            "duration": 10.0,
            "timestamps": [[1.0, 4.0], [5.0, 2.0]],
            "sentences": ["a person sits ## down.", "inverted"],
        },
        "BBB": {
            "duration": 10.5,
            "timestamps": [[8.0, 12.5], [11.0, 12.0], [1.0, 2.0]],
            "sentences": ["past the end", "after the end", " "],
        },
    }
    from_json = run("charades_sta", write(tmp_path / "train.json", content))
    assert from_json == run("charades_sta", *charades)


def test_activitynet_rows_become_samples(tmp_path: Path) -> None:
    content = {"v_1": {"duration": 55.15, "timestamps": [[0, 4.14]], "sentences": [" Two men talk."]}}
    samples, report = run("activitynet", write(tmp_path / "val.json", content))
    assert samples == [Sample("v_1_0", (Video("v_1.mp4", 55.15),), GroundingTarget(Interval(0, 4.14)), "Two men talk.")]
    assert report.issues == ()


def test_qvhighlights_rows_hold_all_spans(tmp_path: Path) -> None:
    row = {"qid": 7, "query": "A dog runs.", "vid": "x_60.0_210.0", "duration": 150, "saliency_scores": [[4, 1, 1]]}
    lines = [{**row, "relevant_windows": [[0, 16], [30, 34]]}, {**row, "qid": 8, "relevant_windows": [[20, 10]]}, row]
    path = write(tmp_path / "val.jsonl", "\n".join(map(json.dumps, lines)))
    samples, report = run("qvhighlights", path)
    target = GroundingTarget(intervals=(Interval(0, 16), Interval(30, 34)))
    assert samples == [Sample("7", (Video("x_60.0_210.0.mp4", 150.0),), target, "A dog runs.")]
    assert [(issue.row_id, issue.action) for issue in report.issues] == [("8", "skipped"), ("7", "skipped")]


def test_wrong_files_of_charades_are_user_errors(tmp_path: Path, charades: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=r"one file for each of .txt, .csv, or one .json"):
        run("charades_sta", charades[0])
    with pytest.raises(UserError, match="charades_sta has a file for each split"):
        run("charades_sta", *charades, split="train")
    with pytest.raises(UserError, match=r"absent\.json: no such file"):
        run("activitynet", tmp_path / "absent.json")
    write(tmp_path / "bad.txt", "AAA 1.0##no end\n")
    with pytest.raises(UserError, match=r"line 'AAA 1.0##no end' is not"):
        run("charades_sta", tmp_path / "bad.txt", charades[1])


def test_malformed_lines_of_charades_are_skipped_and_keep_the_ids_of_later_lines(tmp_path: Path) -> None:
    lines = [
        "AAA 1.0 2.0##one.",
        "no end",
        "AAA 1.0 x##two.",
        "AAA 3.0 4.0##three.",
        "BBB 1 2##no length.",
        "CCC 1 2##bad.",
    ]
    text = write(tmp_path / "a.txt", "\n".join(lines))
    lengths = write(tmp_path / "a.csv", "id,length\nAAA,9\nCCC,long\nDDD\n")
    samples, report = run("charades_sta", text, lengths)
    assert [sample.id for sample in samples] == ["AAA_0", "AAA_2"]
    assert issues(report) == [(id, "invalid_row", "skipped") for id in ("a.txt, row 2", "AAA_1", "BBB_0", "CCC_0")]


def test_lengths_without_the_columns_are_a_user_error(tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt", "AAA 1.0 2.0##one.")
    with pytest.raises(UserError, match=r"a\.csv: expected the columns id and length, got video, seconds"):
        run("charades_sta", text, write(tmp_path / "a.csv", "video,seconds\nAAA,9\n"))


def test_two_lengths_of_one_video_are_a_user_error(tmp_path: Path) -> None:
    text = write(tmp_path / "a.txt", "AAA 1.0 2.0##a person waves.\n")
    run("charades_sta", text, write(tmp_path / "same.csv", "id,length\nAAA,9\nAAA,9\n"))
    lengths = write(tmp_path / "a.csv", "id,length\nAAA,9\nAAA,12\n")
    with pytest.raises(UserError, match=r"a\.csv: AAA has the lengths 9 and 12; remove one of its rows"):
        run("charades_sta", text, lengths)
