from __future__ import annotations

import numpy as np
import pytest

from megatron_vcr1.data.scenes import CORNERS, PAPER_TASKS, Scene, VideoFormat, random_scene, sample_of_scene
from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import CaptionTarget, ChoiceTarget, GroundedChoiceTarget, GroundingTarget

FORMAT = VideoFormat()


def scenes(task: str, split: str = "train", number: int = 60) -> list[Scene]:
    return [random_scene(split, index, seed=0, task=task, video_format=FORMAT) for index in range(number)]


def test_events_have_the_documented_lengths() -> None:
    for split, shortest, longest in (("train", 1.5, 4.0), ("longer_events", 4.5, 6.5)):
        lengths_s = []
        for scene in scenes("temporal_grounding", split):
            target = sample_of_scene(scene, "v").target
            assert isinstance(target, GroundingTarget)
            lengths_s.append(target.interval.duration_s)
            assert target.interval.start_s >= 0 and target.interval.end_s <= 12.0
        assert (min(lengths_s), max(lengths_s)) == (shortest, longest)


def test_unseen_pairs_occur_in_no_other_split() -> None:
    def pairs(split: str) -> set[str]:
        queried = {scene.objects[0].name for task in PAPER_TASKS for scene in scenes(task, split, 200)}
        return queried | {moving.name for scene in scenes("captioning", split, 200) for moving in scene.objects}

    unseen = pairs("unseen_pairs")
    assert len(unseen) == 6
    assert len(pairs("train")) == 12 and pairs("train").isdisjoint(unseen)
    assert pairs("test").isdisjoint(unseen) and pairs("longer_events").isdisjoint(unseen)


def test_questions_have_one_right_option() -> None:
    letters = []
    for scene in scenes("grounded_qa"):
        sample = sample_of_scene(scene, "v")
        assert isinstance(sample.target, GroundedChoiceTarget) and sample.options == CORNERS
        moving = scene.objects[0]
        x, y = np.mean(moving.centers[moving.first_frame : moving.end_frame], axis=0)
        corner = ("bottom" if y > 0.4375 else "top") + (" right" if x > 0.5 else " left")
        assert CORNERS["ABCD".index(sample.target.choice)] == corner
        letters.append(sample.target.choice)
    for scene in scenes("multiple_choice_qa"):
        sample = sample_of_scene(scene, "v")
        assert isinstance(sample.target, ChoiceTarget) and len(set(sample.options)) == 4
        assert sample.options["ABCD".index(sample.target.choice)] == scene.objects[0].colour
        assert scene.objects[0].shape in sample.query and scene.objects[1].shape not in sample.query
        letters.append(sample.target.choice)
    assert all(letters.count(letter) > 15 for letter in "ABCD")


def test_captions_describe_every_event_in_order() -> None:
    for scene in scenes("captioning"):
        target = sample_of_scene(scene, "v").target
        assert isinstance(target, CaptionTarget) and target.caption == " ".join(target.events)
        for moving in scene.objects:
            own = [event for event in target.events if moving.name in event]
            assert f"A {moving.name}" in own[0]
            assert (moving.end_frame < 24) == own[-1].endswith("disappears.")
            x0, x1 = moving.centers[moving.first_frame][0], moving.centers[moving.end_frame - 1][0]
            if any("to the right" in event for event in own):
                assert x1 - x0 >= 0.1


def test_invalid_video_formats_are_refused() -> None:
    with pytest.raises(UserError, match="multiple of 16"):
        VideoFormat(side=50)
    with pytest.raises(UserError, match="needs at least 8 seconds"):
        VideoFormat(num_frames=24, fps=8)
