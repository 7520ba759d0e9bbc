from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from megatron_vcr1.data.importers.cleaning import VideoFolder
from megatron_vcr1.errors import UserError
from megatron_vcr1.rewards.overlap import mean_box_iou
from megatron_vcr1.tasks import TrackingTarget
from megatron_vcr1.types import Box
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
    got10k_sequence(root / "val/GOT_4", 15, ["10,20,40,50"])  # as in the test split
    samples, report = run("got10k", root, split="val")
    assert [sample.id for sample in samples] == ["GOT_1", "GOT_2"]
    assert isinstance(samples[0].target, TrackingTarget)
    assert samples[0].target.boxes == tuple(
        Box(left / 200, 0.2, (left + 40) / 200, 0.7) for left in (0, 2, 4, 6, 8, 10, 12, 14)
    )
    assert [Path(frame).stem for frame in samples[0].media[0].path] == [f"{number:08d}" for number in range(1, 16, 2)]
    assert (samples[0].query, samples[0].duration_s) == ("sloth", 1.5)
    assert samples[1].target == TrackingTarget((Box(0.85, 0.2, 1.0, 0.7),) * 8)
    assert sorted(set(issues(report))) == [
        ("GOT_2", "box_outside_frame", "repaired"),
        ("GOT_4", "incomplete_sequence", "skipped"),
    ]


def test_frames_in_which_the_object_is_absent_are_left_out_and_counted(tmp_path: Path) -> None:
    boxes = [f"{index},20,40,50" for index in range(15)]
    got10k_sequence(tmp_path / "GOT_1", 15, boxes)
    write(tmp_path / "GOT_1/absence.label", "0\n" * 5 + "1\n" * 4 + "0\n" * 6)
    got10k_sequence(tmp_path / "GOT_2", 15, [*boxes[:13], "nan,20,40,50", "0,0,0,0"])  # neither is a box
    got10k_sequence(tmp_path / "GOT_3", 15, boxes)
    write(tmp_path / "GOT_3/absence.label", "0\n" * 7 + "1\n" * 8)
    samples, report = run("got10k", tmp_path)
    lefts = {sample.id: [round(box.x0 * 200) for box in sample.target.boxes] for sample in samples}
    assert lefts["GOT_1"] == [0, 1, 3, 4, 10, 11, 13, 14]  # evenly spaced among the eleven frames with a box
    assert lefts["GOT_2"] == [0, 2, 3, 5, 7, 9, 10, 12]
    for sample in samples:
        assert [int(Path(frame).stem) - 1 for frame in sample.media[0].path] == lefts[sample.id]
    assert issues(report) == [
        ("GOT_1", "object_absent", "repaired"),
        ("GOT_2", "object_absent", "repaired"),
        ("GOT_3", "too_few_frames", "skipped"),
    ]
    assert "out of sight in 4 of 15 frames" in report.issues[0].detail
    assert "7 of 15 frames have a box" in report.issues[2].detail


def test_got10k_json_boxes_belong_to_the_start_and_seven_frames(tmp_path: Path) -> None:
    boxes = [[index / 20, 0.1, index / 20 + 0.2, 0.9] for index in range(8)]
    annotations = write(tmp_path / "val.json", [{"path": "/elsewhere/GOT_1", "object": "sloth", "gt": boxes}])
    folder = tmp_path / "videos/GOT_1"
    folder.mkdir(parents=True)
    for number in range(1, 13):  # in the order of their texts, 10.jpg would come before 2.jpg
        Image.new("RGB", (20, 20)).save(folder / f"{number}.jpg")
    (sample,), _ = run("got10k", annotations, videos=VideoFolder(str(tmp_path / "videos")))
    # 12 frames: 0, int(11 / 6), int(22 / 6), ..., 11, counted from 0
    assert [int(Path(frame).stem) for frame in sample.media[0].path] == [1, 1, 2, 4, 6, 8, 10, 12]
    assert sample.target.boxes[1] == Box(*boxes[1])


def test_real_got10k_boxes_are_a_start_box_and_seven_evenly_spaced_ones(realdata: Path) -> None:
    """The first two boxes of a row nearly agree and all other neighbours do not: they are at most a few frames apart.

    With eight evenly spaced frames, the mean IoU of the first two boxes would be that of the other neighbours.
    """
    samples, _ = run("got10k", realdata / "annotations/got10k/videochat_r1_val.json")
    ious = [
        sum(mean_box_iou([sample.target.boxes[index]], [sample.target.boxes[index + 1]]) for sample in samples) / 180
        for index in range(7)
    ]
    assert len(samples) == 180
    assert ious[0] > 0.8
    assert max(ious[1:]) < 0.45 and max(ious[1:]) - min(ious[1:]) < 0.05  # evenly spaced


def test_got10k_json_lists_frames_where_the_sequences_are(tmp_path: Path) -> None:
    entry = {"path": "/elsewhere/val/GOT_1", "object": "sloth", "gt": [[0.1, 0.0, 0.8, 0.797]] * 8}
    annotations = write(tmp_path / "val.json", [entry, {**entry, "path": "/elsewhere/val/GOT_2"}])
    samples, _ = run("got10k", annotations)
    assert samples[0].media[0].path == "GOT_1/"
    got10k_sequence(tmp_path / "videos/GOT_1", 8, [])
    got10k_sequence(tmp_path / "videos/GOT_2", 6, [])
    samples, report = run("got10k", annotations, videos=VideoFolder(str(tmp_path / "videos")))
    assert [len(sample.media[0].path) for sample in samples] == [8]
    assert issues(report) == [("GOT_2", "too_few_frames", "skipped")]


def test_a_folder_without_sequences_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sequence folders"):
        run("got10k", tmp_path)


def test_frames_are_in_natural_order(tmp_path: Path) -> None:
    folder = tmp_path / "GOT_1"
    got10k_sequence(folder, 0, [])
    for number in range(1, 13):
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (200, 100)).save(folder / f"{number}.jpg")
    write(folder / "groundtruth.txt", "\n".join(f"{number},20,40,50" for number in range(1, 13)))
    (sample,), _ = run("got10k", tmp_path)
    numbers = [int(Path(frame).stem) for frame in sample.media[0].path]
    assert numbers == sorted(numbers) and numbers[0] == 1 and numbers[-1] == 12
    assert [round(box.x0 * 200) for box in sample.target.boxes] == numbers


def test_hidden_and_foreign_files_are_not_frames(tmp_path: Path) -> None:
    got10k_sequence(tmp_path / "GOT_1", 8, ["10,20,40,50"] * 8)
    for name in ("._00000001.jpg", ".DS_Store", "Thumbs.db", "._groundtruth.txt"):
        (tmp_path / "GOT_1" / name).write_bytes(b"\0")
    got10k_sequence(tmp_path / ".Trash", 8, ["10,20,40,50"] * 8)
    samples, report = run("got10k", tmp_path)
    assert [(sample.id, len(sample.media[0].path)) for sample in samples] == [("GOT_1", 8)]
    assert not report.issues


@pytest.mark.parametrize("num_lines", [0, 7, 9])
def test_an_absence_label_of_another_length_is_skipped_and_counted(tmp_path: Path, num_lines: int) -> None:
    for name in ("GOT_1", "GOT_2"):
        got10k_sequence(tmp_path / name, 8, ["10,20,40,50"] * 8)
    write(tmp_path / "GOT_2/absence.label", "0\n" * num_lines)
    write(tmp_path / "GOT_1/absence.label", "0\n" * 8)
    samples, report = run("got10k", tmp_path)
    assert [sample.id for sample in samples] == ["GOT_1"]
    assert issues(report) == [("GOT_2", "incomplete_sequence", "skipped")]
    assert f"8 images, but absence.label has {num_lines} lines" in report.issues[0].detail


@pytest.mark.parametrize("num_boxes", [7, 9])
def test_boxes_for_another_number_of_frames_are_skipped_and_counted(tmp_path: Path, num_boxes: int) -> None:
    got10k_sequence(tmp_path / "GOT_1", 8, ["10,20,40,50"] * num_boxes)
    samples, report = run("got10k", tmp_path)
    assert not samples
    assert issues(report) == [("GOT_1", "incomplete_sequence", "skipped")]


@pytest.mark.parametrize("prefix", ["", "\ufeff"])
def test_meta_info_with_percent_signs_and_a_byte_order_mark_is_read(tmp_path: Path, prefix: str) -> None:
    got10k_sequence(tmp_path / "GOT_1", 8, ["10,20,40,50"] * 8)
    text = "[METAINFO]\nurl: https://e.org/a%20b%s?c=%(d)s\nanno_fps: 10Hz\nobject_class: 100% wool sheep\n"
    write(tmp_path / "GOT_1/meta_info.ini", prefix + text)
    write(tmp_path / "GOT_1/groundtruth.txt", prefix + "10,20,40,50\n" * 8)
    write(tmp_path / "GOT_1/absence.label", prefix + "0\n" * 8)
    (sample,), _ = run("got10k", tmp_path)
    assert (sample.query, sample.duration_s) == ("100% wool sheep", 0.8)


def test_malformed_sequences_among_good_ones_are_skipped_and_listed(tmp_path: Path) -> None:
    for number in range(10):
        got10k_sequence(tmp_path / f"GOT_{number}", 8, ["10,20,40,50"] * 8)
    write(tmp_path / "GOT_1/groundtruth.txt", "10,20,40,x\n" * 8)
    write(tmp_path / "GOT_2/groundtruth.txt", "10,20,40\n" * 8)
    write(tmp_path / "GOT_3/meta_info.ini", "object_class: sloth\n")
    (tmp_path / "GOT_4/meta_info.ini").unlink()
    write(tmp_path / "GOT_5/meta_info.ini", "[METAINFO]\nanno_fps: fast\nobject_class: sloth\n")
    write(tmp_path / "GOT_6/00000001.jpg", "no image")
    write(tmp_path / "GOT_7/meta_info.ini", "[METAINFO]\nanno_fps: 0Hz\nobject_class: sloth\n")
    write(tmp_path / "GOT_8/absence.label", "0\n" * 6 + "yes\n0\n")
    samples, report = run("got10k", tmp_path)
    assert [sample.id for sample in samples] == ["GOT_0", "GOT_9"]
    assert issues(report) == [(f"GOT_{number}", "invalid_row", "skipped") for number in range(1, 9)]
    details = [issue.detail.split(": ", 1)[1] for issue in report.issues]
    assert details[0] == "groundtruth.txt, line 1: '10,20,40,x' is not left,top,width,height"
    assert details[5].endswith("00000001.jpg: not an image that can be read")
    assert details[-2:] == [
        "meta_info.ini: anno_fps is '0Hz', which is not a positive number",
        "absence.label, line 7: 'yes' is neither 0 nor 1",
    ]
    (tmp_path / "GOT_0/meta_info.ini").unlink()
    with pytest.raises(UserError, match="first row, GOT_0"):
        run("got10k", tmp_path)
