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
