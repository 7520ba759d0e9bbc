from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_vcr1.tasks import (
    CaptionTarget,
    ChoiceTarget,
    GroundedChoiceTarget,
    GroundingTarget,
    QualityTarget,
    TrackingTarget,
)
from megatron_vcr1.types import Box, Image, Interval, Sample, Video, interleave

BOX = Box(0.1, 0.2, 0.3, 0.4)
VIDEO = Video("a.mp4")
GROUNDING = GroundingTarget(Interval(1.0, 2.0))


def sample(**changes: Any) -> Sample:
    return Sample(**{"id": "a", "media": (VIDEO,), "target": GROUNDING, "query": "a dog barks", **changes})


@pytest.mark.parametrize("bounds", [(2.0, 1.0), (1.0, 1.0), (-0.1, 1.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_invalid_intervals_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="0 <= start < end"):
        Interval(*bounds)


def test_interval_duration() -> None:
    assert Interval(1.5, 4.0).duration_s == 2.5


@pytest.mark.parametrize(
    "edges", [(0.3, 0.2, 0.1, 0.4), (0.1, 0.4, 0.3, 0.4), (-0.01, 0.2, 0.3, 0.4), (0.1, 0.2, 1.01, 0.4)]
)
def test_inverted_empty_and_outside_boxes_are_refused(edges: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="x0 < x1"):
        Box(*edges)


@pytest.mark.parametrize(
    ("target", "extra", "task"),
    [
        (GROUNDING, {}, "temporal_grounding"),
        (TrackingTarget((BOX, BOX)), {}, "tracking"),
        (GroundedChoiceTarget("B", (Interval(0, 1),)), {"options": ("x", "y")}, "grounded_qa"),
        (ChoiceTarget("A"), {"options": ("x",)}, "multiple_choice_qa"),
        (CaptionTarget("A dog barks.", ()), {"query": ""}, "captioning"),
        (QualityTarget("high quality"), {}, "quality"),
    ],
)
def test_the_task_follows_from_the_type_of_the_target(target: Any, extra: dict[str, Any], task: str) -> None:
    assert sample(target=target, **extra).task == task


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": ""}, "id is empty"),
        ({"query": "  "}, "query is empty"),
        ({"media": ()}, "temporal_grounding needs exactly one video, but there are none"),
        ({"media": (VIDEO, Video("b.mp4"))}, "exactly one video, but there are 2"),
        ({"media": (), "target": QualityTarget("good")}, "quality needs a video or an image"),
        ({"media": (Video("a.mp4", 1.0),)}, "starts at 1.0 s, but the video ends at 1.0 s"),
        ({"options": ("x", "y")}, "temporal_grounding has none"),
        ({"target": ChoiceTarget("A")}, "need 1 to 7, got 0"),
        ({"target": ChoiceTarget("C"), "options": ("x", "y")}, "'C' is not one of the options' letters AB"),
        ({"target": ChoiceTarget(""), "options": ("x", "y")}, "'' is not one of"),
    ],
)
def test_contradictory_samples_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(**changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": ""}, "video is empty"),
        ({"path": ()}, "video is empty"),
        ({"duration_s": 0.0}, "duration_s must be positive"),
        ({"duration_s": float("nan")}, "duration_s must be positive"),
        ({"image_fps": -1.0}, "image_fps must be positive"),
    ],
)
def test_invalid_videos_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Video(**{"path": "a.mp4", **fields})


def test_media_come_before_the_text_or_where_it_marks_them() -> None:
    image = Image("a.png")
    assert interleave("what?", [VIDEO, image]) == [VIDEO, image, "what?"]
    assert interleave("<image>\nis in <video>?", [image, VIDEO]) == [image, "\nis in ", VIDEO, "?"]
    assert interleave("the <video> tag in <image>", [image]) == ["the <video> tag in ", image]
    assert interleave("<video> <image>", []) == ["<video> <image>"]
    assert interleave("what?", [VIDEO, image], text_first=True) == ["what?", VIDEO, image]


@pytest.mark.parametrize("text", ["<video>", "<image><video>", "<video><image><video>", "<video><video><image>"])
def test_marks_that_do_not_match_the_media_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="its media are 1 video, 1 image; mark each of them once, in their order"):
        interleave(text, [VIDEO, Image("a.png")])


def test_an_order_that_no_manifest_can_express_is_refused() -> None:
    media = (Image("a.png"), VIDEO)
    with pytest.raises(ValueError, match="an image comes before a video; mark their places"):
        sample(media=media, query="when?")
    assert sample(media=media, query="When is <image> in <video>?").media == media


@pytest.mark.parametrize("num_boxes", [0, 1, 7])
def test_tracking_needs_pairs_of_frames(num_boxes: int) -> None:
    with pytest.raises(ValueError, match="even number of frames"):
        TrackingTarget((BOX,) * num_boxes)


def test_empty_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one supporting interval"):
        GroundedChoiceTarget("A", ())
    with pytest.raises(ValueError, match="caption is empty"):
        CaptionTarget(" ")
    with pytest.raises(ValueError, match="label is empty"):
        QualityTarget("")


def test_an_interval_may_end_after_the_video() -> None:
    assert sample(media=(Video("a.mp4", 1.5),)).intervals == (Interval(1.0, 2.0),)


def test_samples_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        sample().id = "b"  # type: ignore[misc]
