"""Checks of a video's packets against its header, without decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest

from megatron_vcr1.data.video import VideoError, read_frames
from megatron_vcr1.data.video_index import read_packet_index
from megatron_vcr1.data.video_open import open_video
from megatron_vcr1.data.video_types import Deadline
from tests.data.video_clips import RATE, numbers_of, write_clip


def test_the_index_lists_packets_in_decoding_order_and_frames_in_display_order(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "b_frames.mp4", options={"x264-params": "bframes=3:keyint=12:scenecut=0"})
    with open_video(str(path), Deadline(path, 60)) as source:
        index = read_packet_index(source)
    assert len(index.pts) == 40 and index.shown.all()
    assert (index.dts[1:] > index.dts[:-1]).all() and not (index.pts[1:] > index.pts[:-1]).all()
    assert (index.table.pts[1:] > index.table.pts[:-1]).all()
    assert index.keyframes.tolist() == [0, 12, 24, 36]
    assert index.table.duration_s == pytest.approx(40 / RATE)


def test_metadata_in_another_encoding_than_utf_8_does_no_harm(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "title.mkv", metadata={"title": "Caf\u00e9 au lait"})
    content = path.read_bytes()
    assert content.count("Café".encode()) == 1
    path.write_bytes(content.replace("Café ".encode(), b"Caf\xe9  "))
    assert read_frames(path).frames.shape[0] == 4


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("name", ["cut.mp4", "cut_faststart.mp4", "cut.mkv", "cut.avi"])
def test_a_truncated_video_is_refused(tmp_path: Path, name: str, kept: float) -> None:
    movflags = {"movflags": "faststart"} if "faststart" in name else None
    path = write_clip(tmp_path / name, num_frames=200, container_options=movflags)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(VideoError, match=r"damaged|truncated"):
        read_frames(path)


def test_damaged_time_stamps_are_refused(tmp_path: Path) -> None:
    options = {"movflags": "frag_keyframe+empty_moov"}  # its header promises no length
    path = write_clip(tmp_path / "fragmented.mp4", container_options=options)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"tfdt") + 8] = 0x40  # the highest byte of when the last fragment begins
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"damaged time stamps: 2\.88e\+14 s from first to last"):
        read_frames(path)


def test_a_stream_that_begins_late_does_no_harm(tmp_path: Path) -> None:
    """PyAV knows the streams that a file had when it was opened. It fails at the end of a later one."""
    path = write_clip(tmp_path / "clip.ts")
    with open_video(str(path), Deadline(path, 60)) as source:

        class Late:
            """The container, as if another stream had begun late."""

            def __getattr__(self, name: str) -> Any:
                return getattr(source.container, name)

            def demux(self) -> Iterator[av.Packet]:
                yield from source.container.demux()
                raise IndexError("list index out of range")

        index = read_packet_index(replace(source, container=Late()))  # type: ignore[arg-type]
    assert len(index.pts) == 40


def test_a_transport_stream_whose_clock_wraps_is_continuous(tmp_path: Path) -> None:
    start_ms = 2**33 // 90 - 600  # 0.6 s before the 33 bits of the clock are used up
    path = write_clip(tmp_path / "wraps.ts", times_ms=[start_ms + 40 * i for i in range(40)])
    video = read_frames(path, fps=25)
    assert numbers_of(video.frames) == list(range(40))
    assert video.timestamps_s == pytest.approx([i / RATE for i in range(40)])
    assert numbers_of(read_frames(path, fps=5, start_s=1).frames) == [25, 30, 34, 39]


def test_a_program_stream_with_several_frames_per_packet(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "tiny.mpg", codec="mpeg1video", num_frames=60)
    video = read_frames(path, fps=25)
    assert (numbers_of(video.frames), video.duration_s) == (list(range(60)), pytest.approx(2.4))


@pytest.mark.parametrize("kind", [".ts", ".mpg"])
@pytest.mark.parametrize("start_s", [0, 5000])
def test_joined_recordings_follow_each_other(tmp_path: Path, kind: str, start_s: int) -> None:
    """The clock steps back to 0, or forward to 5000 s, where the second recording starts."""
    codec = {".ts": "libx264", ".mpg": "mpeg2video"}[kind]
    times_ms = [1000 * start_s + 40 * i for i in range(40)]
    first = write_clip(tmp_path / f"first{kind}", codec=codec)
    second = write_clip(tmp_path / f"second{kind}", codec=codec, times_ms=times_ms)
    path = tmp_path / f"joined{kind}"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    video = read_frames(path, fps=25)
    assert numbers_of(video.frames) == [*range(40), *range(40)]
    assert video.duration_s == pytest.approx(3.2, abs=0.1)


def test_a_long_hold_before_the_last_frame_with_b_frames(tmp_path: Path) -> None:
    """The muxer takes the length from decoding times, so the header says 2 s in a video of 10 s."""
    times_ms = [*(40 * i for i in range(50)), 9960]
    path = write_clip(tmp_path / "hold.mp4", num_frames=51, times_ms=times_ms, options={"bf": "2"})
    video = read_frames(path, fps=2)
    assert video.duration_s == pytest.approx(10.0)
    assert numbers_of(video.frames)[4:] == [*[49] * 15, 50]
    assert numbers_of(read_frames(path, start_s=9.97).frames) == [50, 50]  # after the last frame appeared
    with pytest.raises(VideoError, match="no frame between 11 and inf s"):
        read_frames(path, start_s=11)
