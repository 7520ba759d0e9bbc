"""Videos whose packets do not tell when their frames are shown."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest

from megatron_vcr1.data.video import read_frames
from megatron_vcr1.data.video_in_order import _frame_times
from megatron_vcr1.data.video_types import VideoError
from tests.data.odd_clips import set_edit_list, write_field_coded, write_packed_bitstream, write_vfw_matroska
from tests.data.video_clips import RATE, numbers_of, write_clip

CLIPS: dict[str, dict[str, Any]] = {
    "no_time_stamps.h264": {"options": {"bf": "2"}},
    "no_time_stamps.hevc": {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": "log-level=none"}},
    "only_the_first_time_stamp.mpg": {"options": {"bf": "2"}},
    "length_in_frames.ivf": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "b_frames.avi": {"options": {"bf": "2"}},
}


def write(path: Path) -> Path:
    if path.name == "vfw.mkv":
        return write_vfw_matroska(path)
    if path.name == "packed.avi":
        return write_packed_bitstream(path)
    return write_clip(path, **CLIPS[path.name])


@pytest.mark.parametrize("name", [*CLIPS, "vfw.mkv", "packed.avi"])
def test_every_frame_is_read_at_its_time(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    video = read_frames(path, fps=RATE)
    assert numbers_of(video.frames) == list(range(40))
    assert video.timestamps_s == pytest.approx([number / RATE for number in range(40)], abs=1e-3)
    assert video.duration_s == pytest.approx(1.6, abs=2e-3)
    clip = read_frames(path, fps=5, start_s=0.5, end_s=1.3)
    assert numbers_of(clip.frames) == [12, 19, 25, 32]  # 12 since 0.48 s
    assert clip.timestamps_s == pytest.approx([0, 0.26, 0.5, 0.78], abs=1e-3)


@pytest.mark.skipif(not hasattr(av.VideoCodecContext, "field_order"), reason="PyAV 17 does not tell interlaced streams")
@pytest.mark.parametrize("is_split", [True, False])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".h264"])
def test_two_fields_are_one_frame(tmp_path: Path, suffix: str, is_split: bool) -> None:
    path = write_field_coded(tmp_path / f"fields{suffix}", is_split=is_split)
    video = read_frames(path, fps=RATE)
    assert numbers_of(video.frames) == list(range(20))
    assert video.timestamps_s == pytest.approx([number / RATE for number in range(20)], abs=1e-3)
    assert video.duration_s == pytest.approx(0.8, abs=2e-3)
    clip = read_frames(path, fps=10, start_s=0.2, end_s=0.6)
    assert numbers_of(clip.frames) == [5, 8, 11, 14]


def test_damaged_frame_without_a_time_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "no_time_stamps.h264")
    content = bytearray(path.read_bytes())
    damage = slice(len(content) * 2 // 5, len(content) * 2 // 5 + 8)  # in the data of the first frame
    content[damage] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(VideoError, match="damaged: a frame did not decode cleanly"):
        read_frames(path, fps=RATE)


def test_b_frames_of_asf_are_in_order(tmp_path: Path) -> None:
    video = read_frames(write_clip(tmp_path / "b_frames.asf", options={"bf": "2"}), fps=10)
    assert numbers_of(video.frames) == [round(time_s * RATE) for time_s in video.timestamps_s]


def test_a_frame_with_an_earlier_time_replaces_the_one_before_it() -> None:
    assert _frame_times([0, 4, 8, 6, 12], [None] * 5, Fraction(4)).tolist() == [0, 4, 8, 8, 12]


def test_decoding_times_are_taken_if_they_ascend_more_often() -> None:
    assert _frame_times([0, 8, 4, 12, 10], [0, 4, 8, 12, 16], Fraction(4)).tolist() == [0, 4, 8, 12, 16]
    assert _frame_times([0, 8, 4], [None, None, 0], Fraction(4)).tolist() == [0, 8, 8]


def test_missing_times_are_counted_on_at_the_frame_rate() -> None:
    assert _frame_times([None] * 4, [None] * 4, Fraction(100, 3)).tolist() == [0, 33, 67, 100]
    assert _frame_times([90, None, None, 300], [None] * 4, Fraction(100, 3)).tolist() == [90, 123, 157, 300]


EDIT_LISTS = {  # (duration, start) of each part in seconds, and the frames
    "trimmed": ([(0.4, 0.4)], [*range(10, 20)]),
    "trimmed_end": ([(0.8, 0)], [*range(20)]),
    "trimmed_between_keyframes": ([(0.4, 0.36)], [*range(9, 19)]),
    "cut": ([(0.4, 0), (0.4, 0.8)], [*range(10), *range(20, 30)]),
    "repeated": ([(0.4, 0.4), (0.4, 0.4)], [*range(10, 20), *range(10, 20)]),
    "swapped": ([(0.4, 0.8), (0.4, 0)], [*range(20, 30), *range(10)]),
}


@pytest.mark.parametrize("name", EDIT_LISTS)
def test_edit_lists_are_followed(tmp_path: Path, name: str) -> None:
    edits, expected = EDIT_LISTS[name]
    # The first frame before 0 makes the muxer write an edit list.
    path = write_clip(tmp_path / "edited.mp4", options={"bf": "0"}, times_ms=range(-40, 1560, 40))
    video = read_frames(set_edit_list(path, edits), fps=RATE)
    assert numbers_of(video.frames) == expected
    assert video.timestamps_s == pytest.approx([number / RATE for number in range(len(expected))])
    assert video.duration_s == pytest.approx(len(expected) / RATE)
