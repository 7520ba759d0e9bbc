from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from megatron_vcr1.data import video_process
from megatron_vcr1.data.check import BadMedium, LateSpan, check_manifest
from megatron_vcr1.data.video import VideoError, VideoFrames
from tests.data.video_clips import write_clip


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    defaults = {"task": "temporal_grounding", "duration_s": 1.6, "query": "a dog barks"}
    path.write_text("".join(json.dumps(defaults | row) + "\n" for row in rows))
    return path


def row(name: str, video: str, span: list[float]) -> dict[str, Any]:
    return {"id": name, "video": video, "target": {"interval": span}}


def test_rows_are_checked_without_decoding(tmp_path: Path) -> None:
    manifest = write_rows(tmp_path / "m.jsonl", row("a", "gone.mp4", [0, 1]), row("b", "gone.mp4", [1, 2]), {"id": "c"})
    check = check_manifest(manifest, decode_media=False, num_workers=1)
    assert (check.num_rows, check.num_samples_by_task, check.num_overruns) == (3, {"temporal_grounding": 2}, 1)
    assert [bad.line for bad in check.bad_rows] == [3]
    assert not check.passed and check.bad_media == []


def test_every_sample_of_a_bad_video_is_listed(tmp_path: Path) -> None:
    write_clip(tmp_path / "good.mp4")
    (tmp_path / "bad.mp4").write_text("not a video")
    manifest = write_rows(
        tmp_path / "m.jsonl",
        row("a", "bad.mp4", [0, 1]),
        row("b", "good.mp4", [0, 1]),
        row("c", "bad.mp4", [0, 1]),
        row("d", "good.mp4", [5, 6]) | {"duration_s": 9.0},
    )
    check = check_manifest(manifest, decode_media=True, num_workers=2)
    assert [bad.id for bad in check.bad_media] == ["a", "c", "d"]
    assert check.bad_media[2] == BadMedium(
        "d", str(tmp_path / "good.mp4"), "lasts 1.60 s, but an annotated span starts at 5.0 s"
    )
    assert not check.passed
    assert check.as_json()["bad_media"][0]["id"] == "a"


def test_spans_that_end_after_the_decoded_video_are_listed_and_tolerated(tmp_path: Path) -> None:
    write_clip(tmp_path / "good.mp4")
    unknown = {"duration_s": None}
    manifest = write_rows(
        tmp_path / "m.jsonl",
        row("a", "good.mp4", [0, 1.6]) | unknown,
        row("b", "good.mp4", [0, 1.605]) | unknown,
        row("c", "good.mp4", [1, 1.62]) | unknown,
        row("d", "good.mp4", [0, 1]) | {"clip": [0.5, 2.5], "duration_s": 2.0},
    )
    check = check_manifest(manifest, decode_media=True, num_workers=1)
    video = str(tmp_path / "good.mp4")
    assert check.late_spans == [LateSpan("c", video, 1.62, 1.6), LateSpan("d", video, 2.5, 1.6)]
    assert check.passed and check.as_json()["late_spans"][0]["id"] == "c"


def test_a_video_is_decoded_once_for_all_of_its_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[str] = []

    def read(self: object, video: str, **options: Any) -> VideoFrames:
        decoded.append(Path(video).name)
        raise VideoError(video, "damaged")

    monkeypatch.setattr(video_process.VideoReader, "read_frames", read)
    rows = [row(f"{video}{index}", video, [0, 1]) for index in range(3) for video in ("a", "b")]
    totals: list[int] = []
    check = check_manifest(
        write_rows(tmp_path / "m.jsonl", *rows),
        decode_media=True,
        num_workers=1,
        progress=lambda files, total: totals.append(total) or files,  # type: ignore[func-returns-value]
    )
    assert decoded == ["a", "b"] and totals == [2]
    assert len(check.bad_media) == 6


def test_every_video_and_image_of_a_sample_is_checked(tmp_path: Path) -> None:
    write_clip(tmp_path / "good.mp4")
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("not an image")
    question = {"task": "multiple_choice_qa", "options": ["x"], "target": {"choice": "A"}, "query": "which?"}
    rows = [
        {"id": "both", "videos": ["good.mp4", "gone.mp4"], "images": ["good.png", "bad.png"]},
        {"id": "clips", "videos": ["good.mp4", {"video": "good.mp4", "clip": [3, 4]}]},
        {"id": "image", "image": "good.png"},
        {"id": "text"},
    ]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(question | row) + "\n" for row in rows))
    check = check_manifest(manifest, decode_media=True, num_workers=1)
    assert check.num_samples_by_media == {"2 videos, 2 images": 1, "2 videos": 1, "1 image": 1, "text alone": 1}
    assert sorted((bad.id, Path(bad.path).name, bad.reason) for bad in check.bad_media) == [
        ("both", "bad.png", "not an image in a known format"),
        ("both", "gone.mp4", "no such file"),
        ("clips", "good.mp4", "lasts 1.60 s, but an annotated span starts at 3.0 s"),
    ]


def test_a_folder_of_images_lasts_as_long_as_its_image_rate_says(tmp_path: Path) -> None:
    (tmp_path / "frames").mkdir()
    for index in range(10):
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / f"frames/{index}.png")
    listed = {"video": [f"frames/{index}.png" for index in range(10)], "duration_s": 10}
    rows = [
        row("slow", "frames", [8, 9]) | {"image_fps": 1, "duration_s": None},
        row("usual", "frames", [8, 9]) | {"duration_s": None},
        row("list", "frames", [8, 9]) | listed,
    ]
    check = check_manifest(write_rows(tmp_path / "m.jsonl", *rows), decode_media=True, num_workers=1)
    assert [(bad.id, bad.reason) for bad in check.bad_media] == [
        ("usual", "lasts 5.00 s, but an annotated span starts at 8.0 s")
    ]
    assert not check.late_spans


def test_a_crash_of_the_image_decoder_costs_one_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(self: object, path: str) -> None:
        raise VideoError(path, "the decoder crashed (SIGSEGV)")

    monkeypatch.setattr(video_process.VideoReader, "read_image", crash)
    manifest = write_rows(
        tmp_path / "m.jsonl",
        {"id": "a", "task": "quality", "image": "a.png", "target": {"label": "x"}, "duration_s": None},
    )
    check = check_manifest(manifest, decode_media=True, num_workers=1)
    assert [(bad.id, bad.reason) for bad in check.bad_media] == [("a", "the decoder crashed (SIGSEGV)")]
