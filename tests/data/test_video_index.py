"""Checks of a video's packets against its header, without decoding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import pytest

from megatron_vcr1.data.video import VideoError, read_frames
from megatron_vcr1.data.video_index import open_video, read_packet_index
from megatron_vcr1.data.video_types import Deadline
from tests.data.video_clips import RATE, write_clip


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


@pytest.mark.parametrize("name", ["list.m3u8", "list.ffconcat"])
def test_a_playlist_opens_no_other_files(tmp_path: Path, name: str) -> None:
    write_clip(tmp_path / "secret.mp4", num_frames=8)
    texts = {
        "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nsecret.mp4\n#EXT-X-ENDLIST\n",
        "list.ffconcat": "ffconcat version 1.0\nfile secret.mp4\n",
    }
    (tmp_path / name).write_text(texts[name])
    with pytest.raises(VideoError, match=name):
        read_frames(tmp_path / name)


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
