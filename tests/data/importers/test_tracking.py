from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from megatron_vcr1.data.importers.cleaning import VideoFolder
from megatron_vcr1.errors import UserError
from megatron_vcr1.types import (
    Box,
    TrackingTarget,
)
from tests.data.importers.importing import issues, run, write


def got10k_sequence(folder: Path, num_frames: int, boxes: list[str]) -> None:
    for frame in range(num_frames):
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (200, 100)).save(folder / f"{frame + 1:08d}.jpg")
    write(folder / "groundtruth.txt", "\n".join(boxes) + "\n")
    write(folder / "meta_info.ini", "[METAINFO]\nanno_fps: 10Hz\nobject_class: sloth\nresolution: (200, 100)\n")


def test_got10k_sequence_folders_become_samples(tmp_path: Path) -> None:
    root = tmp_path / "GOT-10k"
    got10k_sequence(root / "val/GOT_1", 15, [f"{index},20.0,40,50" for index in range(15)])
    (root / "val/GOT_1/._00000001.jpg").write_bytes(b"metadata that macOS writes beside a file")
    got10k_sequence(root / "val/GOT_2", 15, ["170,20,40,50"] * 15)  # 5 px wide of the 200 px frame is outside
    got10k_sequence(root / "val/GOT_3", 15, ["10,20,40,50"] * 14 + ["0,0,0,0"])  # absent in the last frame
    got10k_sequence(root / "val/GOT_4", 15, ["10,20,40,50"])  # as in the test split
    got10k_sequence(root / "val/GOT_5", 15, ["10,20,40,50"] * 15)
    write(root / "val/GOT_5/absence.label", "0\n" * 14 + "1\n")
    samples, report = run("got10k", root, split="val")
    assert [sample.id for sample in samples] == ["GOT_1", "GOT_2"]
    assert isinstance(samples[0].target, TrackingTarget)
    assert samples[0].target.boxes == tuple(
        Box(left / 200, 0.2, (left + 40) / 200, 0.7) for left in (0, 2, 4, 6, 8, 10, 12, 14)
    )
    assert [Path(frame).stem for frame in samples[0].video] == [f"{number:08d}" for number in range(1, 16, 2)]
    assert (samples[0].query, samples[0].duration_s) == ("sloth", 1.5)
    assert samples[1].target == TrackingTarget((Box(0.85, 0.2, 1.0, 0.7),) * 8)
    assert sorted(set(issues(report))) == [
        ("GOT_2", "box_outside_frame", "repaired"),
        ("GOT_3", "empty_box", "skipped"),
        ("GOT_4", "incomplete_sequence", "skipped"),
        ("GOT_5", "object_absent", "skipped"),
    ]


def test_got10k_json_lists_frames_where_the_sequences_are(tmp_path: Path) -> None:
    entry = {"path": "/elsewhere/val/GOT_1", "object": "sloth", "gt": [[0.1, 0.0, 0.8, 0.797]] * 8}
    annotations = write(tmp_path / "val.json", [entry, {**entry, "path": "/elsewhere/val/GOT_2"}])
    samples, _ = run("got10k", annotations)
    assert samples[0].video == "GOT_1/"
    got10k_sequence(tmp_path / "videos/GOT_1", 8, [])
    got10k_sequence(tmp_path / "videos/GOT_2", 7, [])
    samples, report = run("got10k", annotations, videos=VideoFolder(str(tmp_path / "videos")))
    assert [len(sample.video) for sample in samples] == [8]
    assert issues(report) == [("GOT_2", "too_few_frames", "skipped")]


def test_a_folder_without_sequences_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sequence folders"):
        run("got10k", tmp_path)
