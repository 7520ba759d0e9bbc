"""Which frames are chosen: by the published rule at a constant rate, by time otherwise."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vcr1.data.video_types import (
    FrameTable,
    Sampling,
    VideoError,
    choose_frames,
    nearest_frames,
    num_sampled_frames,
)


def sampling(**options: float) -> Sampling:
    defaults = {"fps": 2.0, "min_frames": 4, "max_frames": 768}
    pixels = {"total_pixels": 3584 * 784, "min_pixels": 16 * 784, "max_pixels": 768 * 784, "factor": 28}
    return Sampling(**(defaults | pixels | options))  # type: ignore[arg-type]


@given(total=st.integers(1, 5000), num_frames=st.integers(2, 768), ticks=st.integers(1, 4000), start=st.integers(-9, 9))
def test_at_a_constant_rate_the_nearest_frames_are_evenly_spaced_indices(
    total: int, num_frames: int, ticks: int, start: int
) -> None:
    chosen = nearest_frames(start + ticks * np.arange(total, dtype=np.int64), num_frames)
    # round() of a Fraction takes a tie to the even side, without an error of floating point
    assert chosen.tolist() == [round(Fraction(i * (total - 1), num_frames - 1)) for i in range(num_frames)]


@given(
    gaps=st.lists(st.integers(1, 500), min_size=1, max_size=60),
    num_frames=st.integers(2, 40),
)
def test_at_any_rate_no_other_frame_is_nearer(gaps: list[int], num_frames: int) -> None:
    pts = np.cumsum([7, *gaps])
    chosen = nearest_frames(pts, num_frames)
    for index, target in zip(chosen, np.linspace(pts[0], pts[-1], num_frames), strict=True):
        assert abs(pts[index] - target) <= np.abs(pts - target).min() + 1e-6


@pytest.mark.parametrize(
    ("duration_s", "total_frames", "options", "expected"),
    [
        (60.0, 1800, {}, 120),
        (60.5, 1800, {}, 120),  # 121 is odd
        (11.9999999, 360, {}, 24),
        (0.5, 15, {}, 4),  # min_frames
        (0.1, 3, {}, 2),  # no more than there are
        (0.04, 1, {}, 2),  # the only one twice
        (3600.0, 108000, {}, 768),
        (60.0, 1800, {"max_frames": 15}, 14),
        (1.0, 30, {"min_frames": 5}, 6),
        (10.0, 20, {"fps": 30.0}, 20),
    ],
)
def test_number_of_frames(duration_s: float, total_frames: int, options: dict[str, float], expected: int) -> None:
    assert num_sampled_frames(duration_s, total_frames, sampling(**options)) == expected


def test_a_part_ends_where_it_was_told_to_even_if_its_last_frame_stays_longer() -> None:
    table = FrameTable(pts=np.array([0, 1, 2, 30]), time_base=Fraction(1), last_duration=1)
    choice = choose_frames(table, sampling(start_s=1.0, end_s=10.0), "still.mp4")
    assert choice.indices.tolist() == [1, 2]
    assert choice.timestamps_s == (0.0, 1.0)
    assert choice.duration_s == 9.0
    whole = choose_frames(table, sampling(start_s=0.0, end_s=math.inf), "still.mp4")
    assert whole.duration_s == 31.0


def test_an_error_survives_a_trip_between_processes() -> None:
    error = pickle.loads(pickle.dumps(VideoError("a.mp4", "no such file")))
    assert (error.file, error.reason, str(error)) == ("a.mp4", "no such file", "a.mp4: no such file")
