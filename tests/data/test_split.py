from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vcr1.data.rows import sample_from_row
from megatron_vcr1.data.split import split_by_video
from megatron_vcr1.errors import UserError
from megatron_vcr1.types import Sample
from tests.data.manifest_rows import ROWS

FRACTIONS = {"train": 0.8, "validation": 0.1, "test": 0.1}


def samples_of(num_per_video: list[int], folder: str = "/data") -> list[Sample]:
    return [
        sample_from_row({**ROWS[0], "id": f"{video}_{index}", "video": f"v{video}.mp4"}, Path(folder))
        for video, num_samples in enumerate(num_per_video)
        for index in range(num_samples)
    ]


@given(num_per_video=st.lists(st.integers(1, 4), min_size=3, max_size=60), seed=st.integers(0, 9))
def test_no_video_is_in_two_parts_and_no_sample_is_lost(num_per_video: list[int], seed: int) -> None:
    samples = samples_of(num_per_video)
    parts = split_by_video(samples, FRACTIONS, seed=seed, folder=Path("/data"))
    videos = {name: {sample.media for sample in part} for name, part in parts.items()}
    assert sorted(sample.id for part in parts.values() for sample in part) == sorted(sample.id for sample in samples)
    assert sum(map(len, videos.values())) == len(num_per_video)
    assert all(videos.values())
    for name, fraction in FRACTIONS.items():
        assert abs(len(videos[name]) - fraction * len(num_per_video)) <= 2
        assert parts[name] == [sample for sample in samples if sample.media in videos[name]]  # in their order


def test_the_split_depends_on_the_seed_and_not_on_the_folder_or_the_order() -> None:
    def ids(samples: list[Sample], folder: str, seed: int) -> dict[str, set[str]]:
        parts = split_by_video(samples, FRACTIONS, seed=seed, folder=Path(folder))
        return {name: {sample.id for sample in part} for name, part in parts.items()}

    first = ids(samples_of([2] * 30), "/data", 0)
    assert first == ids(samples_of([2] * 30, "/elsewhere/d")[::-1], "/elsewhere/d", 0)
    assert first != ids(samples_of([2] * 30), "/data", 1)


def test_a_part_with_fraction_0_is_left_out() -> None:
    parts = split_by_video(samples_of([1] * 10), {"train": 0.7, "validation": 0, "test": 0.3}, seed=0, folder=Path("/"))
    assert {name: len(part) for name, part in parts.items()} == {"train": 7, "test": 3}


def test_samples_that_share_a_video_or_an_image_stay_together() -> None:
    media = [{"videos": ["a", "b"]}, {"video": "b", "image": "x.png"}, {"image": "x.png"}, {"video": "c"}, {}, {}]
    question = {"task": "multiple_choice_qa", "query": "?", "options": ["x"], "target": {"choice": "A"}}
    samples = [sample_from_row({"id": str(index), **question, **files}) for index, files in enumerate(media)]
    parts = split_by_video(samples, {"train": 0.5, "test": 0.5}, seed=0, folder=Path("/data"))
    part_of = {sample.id: name for name, part in parts.items() for sample in part}
    assert part_of["0"] == part_of["1"] == part_of["2"]
    assert len(part_of) == 6  # of four videos: {a, b, x.png}, c and two texts
    assert len({part_of[id] for id in ("0", "3", "4", "5")}) == 2


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"train": 0.8, "test": 0.1}, "add up to 1"),
        ({"train": 1.2, "test": -0.2}, "0 or more"),
        (FRACTIONS, "2 videos cannot be split into 3 parts"),
    ],
)
def test_impossible_splits_are_user_errors(fractions: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_by_video(samples_of([3, 1]), fractions, seed=0, folder=Path("/data"))


def test_lists_that_share_a_frame_stay_together() -> None:
    lists = [["1.png", "2.png"], ["2.png", "3.png"], ["3.png", "4.png"], ["5.png"]]
    samples = [sample_from_row({**ROWS[0], "id": str(index), "video": frames}) for index, frames in enumerate(lists)]
    parts = split_by_video(samples, {"train": 0.5, "test": 0.5}, seed=0, folder=Path("/data"))
    assert sorted(len(part) for part in parts.values()) == [1, 3]
