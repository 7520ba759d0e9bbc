from __future__ import annotations

import json
from pathlib import Path

import PIL.Image

from megatron_vcr1.data.manifest import read_manifest
from megatron_vcr1.data.video_process import VideoReader
from megatron_vcr1.report.gallery import (
    MAX_METRICS,
    MAX_TEXT,
    Exhibit,
    answered_boxes,
    answered_spans,
    evaluation_exhibits,
    rollout_exhibits,
    with_frames,
)
from megatron_vcr1.report.rendering import environment
from megatron_vcr1.report.run_record import read_run
from megatron_vcr1.tasks import ChoiceTarget, GroundedChoiceTarget, GroundingTarget, QualityTarget, TrackingTarget
from megatron_vcr1.types import Box, Image, Interval, Sample, Video
from tests.data.video_clips import write_clip
from tests.report.runs import add_evaluation, make_run, synthetic_manifest


def test_spans_and_boxes_are_read_from_responses() -> None:
    grounding = Sample("a", (Video("a.mp4"),), GroundingTarget(Interval(1, 2)), "when?")
    assert answered_spans(grounding, "<answer>3 to 4</answer>") == (Interval(3, 4),)
    assert answered_spans(grounding, "<answer>later</answer>") == ()
    grounded = Sample("b", (Video("b.mp4"),), GroundedChoiceTarget("A", (Interval(1, 2),)), "what?", options=("x", "y"))
    assert list(answered_spans(grounded, "<answer>A</answer><glue>[(3, 4)]</glue>")) == [Interval(3, 4)]
    tracking = Sample("c", (Video("c.mp4"),), TrackingTarget((Box(0, 0, 1, 1), Box(0, 0, 1, 1))), "it")
    assert list(answered_boxes(tracking, "[[0, 0, 0.5, 1], [0, 0, 1, 1]]")) == [Box(0, 0, 0.5, 1), Box(0, 0, 1, 1)]
    assert answered_boxes(tracking, "[[0, 0, 1, 1]]") == ()
    choice = Sample("d", (Video("d.mp4"),), ChoiceTarget("A"), "what?", options=("x", "y"))
    assert answered_spans(choice, "3 to 4") == answered_boxes(choice, "[[0, 0, 1, 1]]") == ()


def test_the_best_and_the_worst_response_of_a_group_are_shown(tmp_path: Path) -> None:
    manifest = synthetic_manifest(tmp_path / "videos")
    run = make_run(tmp_path / "run", read_manifest(manifest), num_steps=3)
    path = run / "rollouts" / "step_3.jsonl"
    groups = [json.loads(line) for line in path.read_text().splitlines()]
    for response in groups[0]["responses"]:
        response["text"] = "x" * (MAX_TEXT + 7)
        response["reward"]["total"] = 1.0
    path.write_text("".join(json.dumps(group) + "\n" for group in groups) + '{"sample": {}}\n')
    problems: list[str] = []
    exhibits = list(rollout_exhibits(read_run(run), problems))
    by_heading = {exhibit.heading: exhibit for exhibit in exhibits}
    first = by_heading["Step 1: temporal grounding"]
    assert [answer.role for answer in first.answers] == ["best", "worst"]
    totals = [float(dict((name, value) for name, value, _ in answer.parts)["total"]) for answer in first.answers]
    assert totals[0] > totals[1]
    equal = next(
        exhibit for exhibit in exhibits if exhibit.sample.id == groups[0]["sample"]["id"] and "3" in exhibit.heading
    )
    (answer,) = equal.answers
    assert "with equal rewards" in answer.title and answer.num_hidden == 7
    assert len(problems) == 1 and "1 groups cannot be read" in problems[0]


def test_best_median_and_worst_predictions_are_shown(tmp_path: Path) -> None:
    manifest = synthetic_manifest(tmp_path / "videos")
    add_evaluation(tmp_path / "run", "charades_sta", manifest, right=0.5)
    exhibits = list(evaluation_exhibits(read_run(tmp_path / "run"), []))
    assert [exhibit.heading for exhibit in exhibits] == [
        f"charades_sta: {name} of 6" for name in ("best", "median", "worst")
    ]
    assert all(len(exhibit.answers[0].parts) <= MAX_METRICS for exhibit in exhibits)


def test_a_video_without_frames_keeps_its_exhibit_with_the_reason(tmp_path: Path) -> None:
    manifest = synthetic_manifest(tmp_path / "videos")
    add_evaluation(tmp_path / "run", "charades_sta", manifest, right=0.5)
    exhibit = next(evaluation_exhibits(read_run(tmp_path / "run"), []))
    Path(str(exhibit.sample.media[0].path)).unlink()
    with VideoReader() as reader:
        (shown,) = with_frames([exhibit], reader)
    assert list(shown.strips) == [None] and "no such file" in shown.missing[0]


def test_every_video_and_image_of_a_sample_is_shown(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_clip(tmp_path / f"{name}.mp4", num_frames=20)
    PIL.Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    paths = [str(tmp_path / name) for name in ("a.mp4", "b.mp4", "a.png", "absent.png")]
    media = (Video(paths[0]), Video(paths[1]), Image(paths[2]), Image(paths[3]))
    several = Exhibit("several", Sample("s", media, QualityTarget("good"), "how good?"), "good", [])
    text = Exhibit("text", Sample("t", (), ChoiceTarget("A"), "what?", options=("x",)), "A", [])
    with VideoReader() as reader:
        several, text = with_frames([several, text], reader)
    assert [strip is not None for strip in several.strips] == [True, True, True, False]
    assert several.annotated is None  # spans and boxes belong to the only video
    macros = environment().get_template("macros.html.jinja").module
    page = str(macros.exhibit(several))  # type: ignore[attr-defined]
    assert page.count('alt="frame at') == 16 and page.count('alt="image"') == 1
    assert page.count("No frames: ") == 1 and "absent.png" in page
    page = str(macros.exhibit(text))  # type: ignore[attr-defined]
    assert "<img" not in page and "No frames" not in page
