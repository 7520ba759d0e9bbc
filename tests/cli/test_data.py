from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.cli.main import data as commands
from megatron_vcr1.errors import UserError


def vcr1(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    commands.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["data", *map(str, arguments)])
    return args.run(args)


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    content = {"V1": {"duration": 10.0, "timestamps": [[1, 4], [5, 2], [8, 12]], "sentences": ["a", "b", "c"]}}
    path = tmp_path / "train.json"
    path.write_text(json.dumps(content))
    return path


def test_import_writes_manifest_report_and_summary(
    tmp_path: Path, annotations: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "manifests" / "train.jsonl"
    assert vcr1("import", "activitynet", "--annotations", annotations, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "2 of 3 rows written" in printed and "inverted_span" in printed and "V1_1" in printed
    assert "without --videos" in printed
    assert [json.loads(line)["target"] for line in out.read_text().splitlines()] == [
        {"interval": [1.0, 4.0]},
        {"interval": [8.0, 10.0]},
    ]
    report = json.loads((tmp_path / "manifests" / "train.jsonl.report.json").read_text())
    assert (report["num_rows"], report["num_samples"]) == (3, 2)
    assert report["issue_counts"] == {"inverted_span (skipped)": 1, "span_past_end (repaired)": 1}
    assert report["issues"][0] == {
        "row_id": "V1_1",
        "problem": "inverted_span",
        "detail": "[5, 2] s",
        "action": "skipped",
    }


def test_import_prints_json_and_fails_when_nothing_is_left(
    tmp_path: Path, annotations: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, videos = tmp_path / "m.jsonl", tmp_path / "none"
    arguments = ("import", "activitynet", "--annotations", annotations, "--videos", videos, "--out", out, "--json")
    with pytest.raises(UserError, match="none: no such folder"):
        vcr1(*arguments)
    videos.mkdir()
    out.write_text("an earlier manifest")
    assert vcr1(*arguments) == 1
    assert out.read_text() == "an earlier manifest"
    report = json.loads(capsys.readouterr().out)
    assert report["issue_counts"] == {"missing_video (skipped)": 3} and report["videos_checked"]


def test_half_a_character_skips_its_row_and_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = tmp_path / "train.json"
    annotations.write_text(
        '{"V1": {"duration": 9, "timestamps": [[1, 4], [2, 5]], "sentences": ["a \\ud83d", "b"]},'
        ' "V\\ude00": {"duration": 9, "timestamps": [[1, 4]], "sentences": ["c"]}}'
    )
    out = tmp_path / "m.jsonl"
    for extra in ((), ("--json",)):
        assert vcr1("import", "activitynet", "--annotations", annotations, "--out", out, *extra) == 0
        assert "lone surrogate" in capsys.readouterr().out
    report = json.loads((tmp_path / "m.jsonl.report.json").read_text())
    assert [issue["row_id"] for issue in report["issues"]] == ["V1_0", "V\ude00_0"]
    assert len(out.read_text().splitlines()) == 1


def test_import_of_a_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.json: no such file"):
        vcr1("import", "activitynet", "--annotations", tmp_path / "absent.json", "--out", tmp_path / "m.jsonl")


def test_boxes_of_a_json_file_are_refused_without_the_frames_they_belong_to(tmp_path: Path) -> None:
    annotations = tmp_path / "val.json"
    annotations.write_text("[]")
    with pytest.raises(UserError, match="belong to certain frames of a sequence; name the folder in --videos"):
        vcr1("import", "got10k", "--annotations", annotations, "--out", tmp_path / "m.jsonl")


def test_an_unknown_task_is_refused_with_the_known_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        vcr1("synthesize", "--out", "a", "--num-videos", "1", "--tasks", "grounding")
    assert "invalid choice: 'grounding' (choose from 'temporal_grounding', 'tracking'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("import", "nonsense", "--annotations", "a", "--out", "b"),
        ("import", "activitynet", "--annotations", "a", "--out", "b", "--limit", "0"),
        ("synthesize", "--out", "a", "--num-videos", "-1"),
        (),
    ],
)
def test_bad_usage_exits_with_2(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as exit_:
        vcr1(*arguments)
    assert exit_.value.code == 2


def test_synthesize_then_check_with_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vcr1("synthesize", "--out", tmp_path, "--num-videos", 6, "--num-test-videos", 1, "--seed", 1) == 0
    assert "9 videos" in capsys.readouterr().out
    shape = ("--num-videos", 1, "--num-test-videos", 1, "--tasks", "captioning")
    assert vcr1("synthesize", "--out", tmp_path / "other", *shape, "--json") == 0
    made: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert made["num_videos"] == 1 + len(made["manifests"]) - 1
    assert all(Path(manifest).is_file() for manifest in made["manifests"].values())
    manifest = tmp_path / "train.jsonl"
    assert vcr1("check", manifest) == 0
    assert "6 rows: 1 temporal_grounding, 1 tracking" in capsys.readouterr().out

    (tmp_path / "videos/train/000001.mp4").write_bytes(b"damaged")
    (tmp_path / "videos/train/000002.mp4").unlink()
    assert vcr1("check", manifest, "--videos", "--num-workers", 1, "--json") == 1
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert result["bad_rows"] == [] and result["media_decoded"]
    assert [bad["id"] for bad in result["bad_media"]] == ["train_000001", "train_000002"]
    assert "no such file" in result["bad_media"][1]["reason"]


def test_check_lists_bad_rows_spans_past_the_end_and_videos_that_are_shorter_than_annotated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vcr1("synthesize", "--out", tmp_path, "--num-videos", 2, "--num-test-videos", 1, "--tasks", "temporal_grounding")
    manifest = tmp_path / "train.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[0] |= {"duration_s": 100.0, "target": {"interval": [50.0, 60.0]}}
    rows[1]["target"]["interval"][1] = 13.0
    manifest.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "x"}]))
    capsys.readouterr()
    assert vcr1("check", manifest, "--videos", "--num-workers", 1) == 1
    printed = capsys.readouterr().out
    assert f"{manifest}, line 3: key 'task' is missing; add it" in printed
    assert "sample train_000000:" in printed and "lasts 12.00 s, but an annotated span starts at 50.0 s" in printed
    assert "sample train_000001:" in printed and "lasts 12.00 s, but a span ends at 13.0 s" in printed
    assert "1 samples have a span that ends after duration_s" in printed
    assert "3 rows: 2 temporal_grounding; 1 bad rows" in printed
    assert "1 samples with a bad video or image" in printed
    assert "1 samples have a span that ends after the video" in printed


def test_split_writes_three_manifests_by_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"id": f"{video}_{index}", "task": "quality", "video": f"videos/{video}.mp4", "duration_s": None, "query": "q?"}
        | {"target": {"label": "low"}}
        for video in range(10)
        for index in range(2)
    ]
    manifest = tmp_path / "all.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert vcr1("split", manifest, "--out", tmp_path, "--json") == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts == {
        str(tmp_path / f"{name}.jsonl"): number for name, number in (("train", 16), ("validation", 2), ("test", 2))
    }
    written = [json.loads(line) for path in counts for line in Path(path).read_text().splitlines()]
    assert sorted(written, key=lambda row: row["id"]) == rows  # with relative paths
    assert vcr1("split", manifest, "--out", tmp_path / "two", "--fractions", 0.5, 0, 0.5) == 0
    assert "train.jsonl: 10 samples of 5 videos" in capsys.readouterr().out
    assert not (tmp_path / "two/validation.jsonl").exists()
    with pytest.raises(UserError, match="name another folder"):
        vcr1("split", tmp_path / "train.jsonl", "--out", tmp_path)


def test_check_of_an_empty_manifest_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.jsonl").write_text("\n")
    assert vcr1("check", tmp_path / "m.jsonl") == 1
    assert "0 rows: no sample" in capsys.readouterr().out
