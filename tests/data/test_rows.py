from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vcr1.data.rows import RowError, row_from_sample, sample_from_row
from megatron_vcr1.types import Image, Interval, Video
from tests.data.manifest_rows import ROWS, changed, without


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["id"])
def test_rows_are_equal_after_a_round_trip(row: dict[str, Any]) -> None:
    assert row_from_sample(sample_from_row(row)) == row


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 2], r"expected a JSON object, got \[1, 2\]"),
        (without(0, "target"), "key 'target' is missing; add it"),
        (changed(0, videos=["b.mp4"]), "keys 'video' and 'videos' contradict each other; put everything into 'videos'"),
        (changed(6, image="b.png"), "keys 'image' and 'images' contradict each other"),
        (changed(6, clip=[1, 2]), "key 'clip' describes the video of 'video', which is missing; put it into the items"),
        (changed(7, duration_s=2.0), "key 'duration_s' describes .*; put it next to 'video', or remove it"),
        (changed(6, videos=[{"clip": [1, 2]}]), r"key 'videos\[0\]': expected a path or \{"),
        (changed(6, videos=["a.mp4", {"video": "b.mp4", "fps": 2}]), r"key 'videos\[1\].fps' is unknown"),
        (
            changed(6, videos=["a.mp4", {"video": "b.mp4", "clip": [2, 1]}]),
            r"key 'videos\[1\].clip': an interval needs",
        ),
        (changed(6, videos="a.mp4"), "key 'videos': expected a list"),
        (changed(7, image=["a.png"]), "key 'image': expected text"),
        (changed(7, image=""), "image is empty; correct the row"),
        (
            changed(6, query="<video> or <image>?"),
            "the query marks <video>, <image>, <image>, but its media are 2 videos, 2 images",
        ),
        (
            changed(0, video=None, duration_s=None),
            "temporal_grounding needs exactly one video, but there are none; correct the row",
        ),
        (without(0, "video") | {"videos": ["a", "b"], "duration_s": None}, "exactly one video, but there are 2"),
        (without(4, "video") | {"duration_s": None}, "captioning needs a video or an image, but there is none"),
        (changed(0, qeury="x"), "key 'qeury' is unknown; remove it or correct its name"),
        (changed(0, task="grounding"), "key 'task': \"grounding\" is not one of temporal_grounding, tracking"),
        (changed(0, id=7), "key 'id': expected text, got 7"),
        (changed(0, video=7), "key 'video': expected a path or a list"),
        (changed(0, video=[1]), r"key 'video\[0\]': expected text"),
        (changed(0, duration_s="12"), "key 'duration_s': expected a number, got \"12\""),
        (changed(0, duration_s=10**400), "key 'duration_s': the number is too large"),
        (changed(0, duration_s=True), "key 'duration_s': expected a number"),
        (changed(0, query=None), "key 'query': expected text, got null"),
        (changed(0, query="a \ud83d b"), "key 'query': lone surrogate, half a character, at 2; repair the text"),
        (changed(2, options=["a", "\ude00"]), r"key 'options\[1\]': lone surrogate, half a character, at 0"),
        (changed(0, target=[1, 2]), "key 'target': expected an object"),
        (changed(0, target={}), "needs either 'interval', the only span, or 'intervals'"),
        (changed(0, target={"interval": [1, 2], "end": 2}), "key 'target.end' is unknown"),
        (changed(0, target={"interval": [1]}), r"key 'target.interval': expected \[start_s, end_s\], got \[1\]"),
        (changed(0, target={"interval": [4, 1]}), "key 'target.interval': an interval needs 0 <= start < end"),
        (changed(0, target={"interval": [12.5, 13]}), "interval starts at 12.5 s, but the video ends at 12.5 s"),
        (changed(1, target={"boxes": [[0, 0, 640, 480]] * 2}), r"'target.boxes\[0\]'.*divide pixels"),
        (changed(1, target={"boxes": [[0, 0, 1, 1]] * 7}), "even number of frames"),
        (changed(2, target={"choice": "C", "intervals": [[0, 1]]}), "'C' is not one of the options' letters AB"),
        (changed(2, options="AB"), "key 'options': expected a list"),
        (changed(3, clip=[8, 3]), "key 'clip': an interval needs"),
        (changed(4, target={"caption": "x", "events": "y"}), "key 'target.events': expected a list"),
    ],
)
def test_bad_rows_name_the_key_and_what_to_do(row: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        sample_from_row(row)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["A", "tracking"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["interval", "boxes", "x"]), inner),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(row=st.sampled_from(ROWS), key=st.sampled_from([*ROWS[3], *ROWS[6]]), value=JSON_VALUES, in_target=st.booleans())
def test_any_row_is_a_sample_or_a_row_error(row: dict[str, Any], key: str, value: Any, in_target: bool) -> None:
    mutated = {**row, "target": dict.fromkeys(row["target"], value)} if in_target else {**row, key: value}
    try:
        sample = sample_from_row(mutated)
    except RowError:
        return
    assert sample_from_row(row_from_sample(sample)) == sample


def test_media_are_in_the_order_of_their_marks() -> None:
    sample = sample_from_row(ROWS[6], Path("/data"))
    assert sample.media == (
        Image("/data/a.png"),
        Video("/data/a.mp4"),
        Video("/data/b.mp4", 4.0, Interval(1.0, 5.0)),
        Image("/data/b.png"),
    )
    unmarked = sample_from_row(changed(6, query="what differs?", options=["x", "y"]))
    assert [medium.kind for medium in unmarked.media] == ["video", "video", "image", "image"]


def test_null_counts_as_missing() -> None:
    absent = {"video": None, "videos": None, "duration_s": None, "clip": None, "image_fps": None, "images": None}
    assert sample_from_row(ROWS[7] | absent) == sample_from_row(ROWS[7])
