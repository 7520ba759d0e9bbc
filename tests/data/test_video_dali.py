"""DALI on the CPU gives the same frames and times as PyAV, and similar colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vcr1.data.video import VideoError, VideoFrames, read_frames
from tests.data.video_clips import numbers_of, write_clip

pytest.importorskip("nvidia.dali", reason="nvidia-dali is not installed")

# DALI rounds when it turns YUV into RGB, where FFmpeg's fast path truncates, and ignores the BT.709 tag of some files.
MEAN_LEVELS = 3.0

KINDS: dict[str, dict[str, Any]] = {
    "h264_open_gop.mp4": {"options": {"x264-params": "bframes=3:open-gop=1:keyint=12:min-keyint=12:scenecut=0"}},
    "h264.mkv": {},
    "hevc.mp4": {"codec": "libx265", "options": {"preset": "ultrafast", "x265-params": "bframes=3:log-level=none"}},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
}
REAL_VIDEOS = (
    "carebench_demo.mp4",
    "decord_video_90.mov",
    "mmaction2_demo.mp4",
    "mmaction2_demo_skeleton.mp4",
    "sophgo_poem.mp4",
    "torchcodec_h265_video.mp4",
)


def assert_same_video(dali: VideoFrames, pyav: VideoFrames) -> None:
    assert dali.backend == "dali-cpu"
    assert dali.timestamps_s == pyav.timestamps_s
    assert dali.duration_s == pyav.duration_s
    assert dali.frames.shape == pyav.frames.shape
    assert (dali.frames.int() - pyav.frames.int()).abs().float().mean() < MEAN_LEVELS


@pytest.mark.parametrize("fps", [2, 25])
@pytest.mark.parametrize("kind", KINDS)
def test_dali_and_pyav_choose_the_same_frames(tmp_path: Path, kind: str, fps: float) -> None:
    path = write_clip(tmp_path / kind, **KINDS[kind])
    dali, pyav = read_frames(path, fps=fps, backend="dali-cpu"), read_frames(path, fps=fps)
    assert numbers_of(dali.frames) == numbers_of(pyav.frames)
    assert_same_video(dali, pyav)


def test_variable_rate_rotation_and_more_frames_than_one_run(tmp_path: Path) -> None:
    times_ms = [40 * i + (2000 if i > 60 else 0) for i in range(100)]
    path = write_clip(tmp_path / "phone.mp4", num_frames=100, times_ms=times_ms, rotation=90, size=(112, 112))
    dali, pyav = read_frames(path, fps=25, backend="dali-cpu"), read_frames(path, fps=25)
    assert len(dali.timestamps_s) == 150  # 6 s; the frame before the gap of 2 s is repeated
    assert_same_video(dali, pyav)


def test_the_gpu_has_read_the_frames_of_a_run_before_the_next_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """DALI's executor writes the next frames to the same memory, on a stream of its own."""
    from megatron_vcr1.data import video_dali

    calls: list[str] = []
    pipeline = video_dali._pipeline(None)

    class Recorded:
        feed_input = staticmethod(pipeline.feed_input)

        def run(self) -> Any:
            calls.append("run")
            return pipeline.run()

        def synchronize(self) -> None:
            calls.append("synchronize")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", Recorded)
    monkeypatch.setattr(video_dali, "_pipeline", lambda device_id: Recorded())
    path = write_clip(tmp_path / "long.mp4", num_frames=100)
    assert len(read_frames(path, fps=25, backend="dali-gpu").timestamps_s) == 100
    assert calls == ["run", "synchronize"] * 2


def test_bad_files_are_refused_and_the_next_one_decodes(tmp_path: Path) -> None:
    good = write_clip(tmp_path / "good.mp4")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(good.read_bytes()[:-200])
    blank = bytearray(good.read_bytes())
    blank[1000:1900] = bytes(900)
    (tmp_path / "blank.mp4").write_bytes(blank)
    other_codec = write_clip(tmp_path / "other.mp4", codec="mpeg4")
    made_up_times = write_clip(tmp_path / "times.avi", options={"bf": "0"})
    for path in (tmp_path / "gone.mp4", cut, tmp_path / "blank.mp4", other_codec, made_up_times):
        with pytest.raises(VideoError, match=path.name):
            read_frames(path, backend="dali-cpu")
        assert torch.equal(read_frames(good, backend="dali-cpu").frames, read_frames(good, backend="dali-cpu").frames)


@pytest.mark.parametrize("name", REAL_VIDEOS)
def test_real_videos(realdata: Path, name: str) -> None:
    path = realdata / "videos" / name
    assert_same_video(read_frames(path, backend="dali-cpu"), read_frames(path))


def test_real_damaged_video(realdata: Path) -> None:
    with pytest.raises(VideoError, match="DALI cannot decode it"):
        read_frames(realdata / "videos" / "decord_corrupted.mp4", backend="dali-cpu")
