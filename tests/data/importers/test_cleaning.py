from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vcr1.data.importers.cleaning import VideoFolder
from tests.data.importers.importing import issues, run, write


def test_videos_are_found_under_any_suffix_and_missing_ones_skip_their_rows(
    charades: tuple[Path, Path], tmp_path: Path
) -> None:
    write(tmp_path / "videos/AAA.webm", "")
    samples, report = run("charades_sta", *charades, videos=VideoFolder(str(tmp_path / "videos")))
    assert [sample.media[0].path for sample in samples] == [str(tmp_path / "videos/AAA.webm")]
    assert [row for row, problem, _ in issues(report) if problem == "missing_video"] == ["BBB_0", "BBB_1"]
    assert report.videos_checked


def test_videos_are_found_through_fsspec(charades: tuple[Path, Path]) -> None:
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://charades/BBB.mp4", "wb") as file:
        file.write(b"x")
    samples, _ = run("charades_sta", *charades, videos=VideoFolder("memory://charades"))
    assert [sample.media[0].path for sample in samples] == ["memory://charades/BBB.mp4"]


@pytest.mark.parametrize(("span", "problem"), [([5.0, 5.0], "empty_span"), ([5.0, 2.0], "inverted_span")])
def test_empty_and_inverted_spans_are_told_apart(tmp_path: Path, span: list[float], problem: str) -> None:
    content = {"v_1": {"duration": 9, "timestamps": [span, [1, 2]], "sentences": ["bad", "good"]}}
    samples, report = run("activitynet", write(tmp_path / "val.json", content))
    assert [sample.id for sample in samples] == ["v_1_1"]
    assert issues(report) == [("v_1_0", problem, "skipped")]


def test_a_duration_that_is_text_is_named(tmp_path: Path) -> None:
    rows = {"duration": 9, "timestamps": [[0, 4]], "sentences": ["Two men talk."]}
    content = {"v_1": rows, "v_2": {**rows, "duration": "9 s"}}
    samples, report = run("activitynet", write(tmp_path / "val.json", content))
    assert [sample.id for sample in samples] == ["v_1_0"]
    assert issues(report) == [("v_2_0", "invalid_row", "skipped")]
    assert "the duration '9 s' is not a number" in report.issues[0].detail


def test_boxes_in_pixels_are_not_cut_to_the_whole_frame(tmp_path: Path) -> None:
    rows = [
        {"path": "GOT_1", "object": "dog", "gt": [[-0.1, 0.2, 1.1, 0.5]] * 8},
        {"path": "GOT_2", "object": "dog", "gt": [[0, 0, 320, 240]] * 8},
    ]
    samples, report = run("got10k", write(tmp_path / "val.json", rows))
    assert [sample.id for sample in samples] == ["GOT_1"]
    assert ("GOT_2", "box_in_pixels", "skipped") in issues(report)


def test_repeated_and_invalid_rows_are_reported(tmp_path: Path) -> None:
    row = {"id": "a", "task": "quality", "video": "a.mp4", "query": "how?", "target": {"label": "good"}}
    rows = write(tmp_path / "rows.json", [row, row, {**row, "id": "b", "target": {}}, {**row, "id": "c", "fps": 2}])
    samples, report = run("huggingface", rows)
    assert [sample.id for sample in samples] == ["a"]
    assert issues(report) == [
        ("a", "repeated_id", "skipped"),
        ("b", "invalid_row", "skipped"),
        ("c", "invalid_row", "skipped"),
    ]
    assert report.issue_counts() == {"invalid_row (skipped)": 2, "repeated_id (skipped)": 1}


def test_images_and_videos_are_found_by_the_suffixes_of_their_kind(tmp_path: Path) -> None:
    for name in ("1.mp4", "2.png", "3.gif", "3.gif.mp4", "4.flv"):
        write(tmp_path / name, "")
    question = {"task": "quality", "query": "how?", "target": {"label": "good"}}
    media = [
        {"image": "1"},
        {"image": "2"},
        {"image": "3.gif"},
        {"video": "4.flv"},
        {"video": "1"},
        {"video": ["2", "1"]},
    ]
    rows = write(tmp_path / "rows.json", [question | {"id": str(index)} | medium for index, medium in enumerate(media)])
    samples, report = run("huggingface", rows, videos=VideoFolder(str(tmp_path)))
    paths = [str(tmp_path / name) for name in ("2.png", "3.gif", "4.flv", "1.mp4")]
    assert [sample.media[0].path for sample in samples] == paths
    assert issues(report) == [("0", "missing_image", "skipped"), ("5", "missing_image", "skipped")]
    unchecked, _ = run("huggingface", rows)
    assert [sample.media[0].path for sample in unchecked][:5] == ["1", "2", "3.gif", "4.flv", "1.mp4"]
