"""The choice of frames: the published rule at a constant rate, and the frame on screen at any rate."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vcr1.data.frame_rules import PixelOptions, WholeVideoRules
from megatron_vcr1.data.video_types import (
    FrameTable,
    Sampling,
    VideoError,
    choose_frames,
    frames_on_screen,
    num_sampled_frames,
)


def sampling(**options: Any) -> Sampling:
    defaults: dict[str, Any] = {"fps": 2.0, "min_frames": 4, "max_frames": 768, "pixels": PixelOptions(), "factor": 28}
    return Sampling(**(defaults | options))


@given(total=st.integers(1, 5000), num_frames=st.integers(2, 768), ticks=st.integers(1, 4000))
def test_a_constant_rate_gives_the_published_evenly_spaced_indices(total: int, num_frames: int, ticks: int) -> None:
    num_frames = min(num_frames, max(total, 2))
    chosen = frames_on_screen(ticks * np.arange(total, dtype=np.int64), ticks * total, num_frames)
    assert chosen.tolist() == np.linspace(0, total - 1, num_frames).round().tolist()


@given(shown_for=st.lists(st.integers(1, 500), min_size=1, max_size=60), num_pairs=st.integers(1, 20))
def test_each_frame_is_on_screen_during_its_part_of_the_duration(shown_for: list[int], num_pairs: int) -> None:
    num_frames = 2 * num_pairs
    appears = np.cumsum([0, *shown_for[:-1]])
    disappears = np.cumsum(shown_for)
    duration = sum(shown_for)
    chosen = frames_on_screen(appears, duration, num_frames)
    assert (chosen[0], chosen[-1]) == (0, len(shown_for) - 1)
    for i, frame in enumerate(chosen):
        assert appears[frame] * num_frames < (i + 1) * duration
        assert disappears[frame] * num_frames > i * duration


def test_long_videos_in_nanoseconds_do_not_overflow() -> None:
    chosen = frames_on_screen(np.arange(10_000) * 10**11, 10**15, 768)
    assert chosen.tolist() == [round(Fraction(i * 9999, 767)) for i in range(768)]


@pytest.mark.parametrize(
    ("duration_s", "total_frames", "options", "expected"),
    [
        (60.0, 1800, {}, 120),
        (60.5, 1800, {}, 120),  # 121 is odd
        (11.9999999, 360, {}, 24),
        (0.5, 15, {}, 4),  # min_frames
        (0.1, 3, {}, 2),  # no more than the video has
        (0.04, 1, {}, 2),  # the only frame twice
        (3600.0, 108000, {}, 768),
        (60.0, 1800, {"max_frames": 15}, 14),
        (1.0, 30, {"min_frames": 5}, 6),
        (10.0, 20, {"fps": 30.0}, 20),
        (10.0, math.inf, {}, 20),
    ],
)
def test_number_of_frames(duration_s: float, total_frames: float, options: dict[str, float], expected: int) -> None:
    assert num_sampled_frames(duration_s, total_frames, sampling(**options)) == expected


@given(total=st.integers(2, 20_000), fps=st.floats(0.5, 12), min_frames=st.integers(2, 9))
def test_rules_for_whole_videos_sample_any_number_of_frames(total: int, fps: float, min_frames: int) -> None:
    rules = WholeVideoRules(min_video_pixels=4096, max_video_pixels=2**24)
    options = sampling(fps=fps, min_frames=min_frames, rules=rules)
    published = min(max(int(total / 25 * fps + 1e-6), min_frames), 768, total)
    assert num_sampled_frames(total / 25, total, options) == published


def test_a_frame_that_is_held_is_sampled_for_as_long_as_it_is_on_screen() -> None:
    held = FrameTable(pts=np.arange(50), time_base=Fraction(1, 25), last_duration=201)  # 2 s at 25 fps, then 8 s still
    choice = choose_frames(held, sampling(), "recording.mp4")
    assert choice.indices.tolist() == [0, 13, 26, 38, *[49] * 16]
    assert choice.timestamps_s == tuple(index / 25 for index in choice.indices)
    assert choice.duration_s == 10.0


SLIDES = FrameTable(pts=np.array([0, 5, 10, 15]), time_base=Fraction(1), last_duration=5)


@pytest.mark.parametrize(
    ("start_s", "end_s", "indices", "timestamps_s", "duration_s"),
    [
        (2.0, 8.0, [0, 1], (0.0, 3.0), 6.0),  # the first slide is on screen at 2 s
        (6.0, 9.0, [1, 1], (0.0, 0.0), 3.0),  # no slide appears in the clip
        (5.0, 10.0, [1, 1], (0.0, 0.0), 5.0),  # an end is exclusive
        (4.9999999, 11.0, [1, 2], (0.0, 5.0), 6.0),  # a rounded start
        (17.0, math.inf, [3, 3], (0.0, 0.0), 3.0),
        (0.0, 60.0, [0, 1, 2, 3], (0.0, 5.0, 10.0, 15.0), 20.0),
    ],
)
def test_a_clip_starts_with_the_frame_on_screen_at_its_start(
    start_s: float, end_s: float, indices: list[int], timestamps_s: tuple[float, ...], duration_s: float
) -> None:
    choice = choose_frames(SLIDES, sampling(start_s=start_s, end_s=end_s), "slides.mp4")
    assert choice.indices.tolist() == indices
    assert choice.timestamps_s == pytest.approx(timestamps_s)
    assert choice.duration_s == pytest.approx(duration_s)


def test_a_clip_after_the_end_is_an_error() -> None:
    with pytest.raises(VideoError, match=r"slides\.mp4: no frame between 20 and 21 s in a video of 20\.00 s"):
        choose_frames(SLIDES, sampling(start_s=20.0, end_s=21.0), "slides.mp4")


def test_a_clip_ends_at_its_end_although_its_last_frame_stays_longer() -> None:
    table = FrameTable(pts=np.array([0, 1, 2, 30]), time_base=Fraction(1), last_duration=1)
    choice = choose_frames(table, sampling(fps=1.0, start_s=1.0, end_s=11.0), "still.mp4")
    assert choice.indices.tolist() == [1, *[2] * 9]
    assert choice.timestamps_s == (0.0, *[1.0] * 9)
    assert choice.duration_s == 10.0
    assert choose_frames(table, sampling(), "still.mp4").duration_s == 31.0


def test_a_video_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "no such file")))
    assert (error.file, error.reason, str(error)) == ("a.mp4", "no such file", "a.mp4: no such file")
