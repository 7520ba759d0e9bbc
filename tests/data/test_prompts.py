from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vcr1.data.prompts import (
    PromptTemplates,
    PromptTooLongError,
    build_messages,
    load_templates,
    prepare_sample,
    smaller_video,
    target_text,
)
from megatron_vcr1.data.synthesize import write_video
from megatron_vcr1.data.video import VideoError, VideoFrames
from megatron_vcr1.errors import UserError
from megatron_vcr1.types import (
    Box,
    CaptionTarget,
    ChoiceTarget,
    GroundedChoiceTarget,
    GroundingTarget,
    Interval,
    QualityTarget,
    Target,
    Task,
    TrackingTarget,
    VideoSample,
)
from tests.data.tiny_processor import tiny_processor

BOXES = tuple(Box(0.1, 0.25, 0.5 + index / 100, 0.75) for index in range(8))
TARGETS: dict[Task, Target] = {
    Task.TEMPORAL_GROUNDING: GroundingTarget(Interval(12.5, 17.0)),
    Task.TRACKING: TrackingTarget(BOXES),
    Task.GROUNDED_QA: GroundedChoiceTarget("B", (Interval(1, 2.25), Interval(4, 5))),
    Task.MULTIPLE_CHOICE_QA: ChoiceTarget("A"),
    Task.CAPTIONING: CaptionTarget("A dog barks."),
    Task.QUALITY: QualityTarget("low quality"),
}
ANSWERS = {
    Task.TEMPORAL_GROUNDING: "<answer>12.50 to 17.00</answer>",
    Task.GROUNDED_QA: "<answer>B</answer><glue>[(1.00, 2.25), (4.00, 5.00)]</glue>",
    Task.MULTIPLE_CHOICE_QA: "<answer>A</answer>",
    Task.CAPTIONING: "<answer>A dog barks.</answer>",
    Task.QUALITY: "<answer>low quality</answer>",
}


def sample(task: Task, **changes: Any) -> VideoSample:
    fields: dict[str, Any] = {"id": "a", "video": "a.mp4", "target": TARGETS[task], "query": "$5 for {this}?"}
    if task in (Task.GROUNDED_QA, Task.MULTIPLE_CHOICE_QA):
        fields["options"] = ("a $dog", "a cat")
    return VideoSample(**{**fields, **changes})


@pytest.fixture(scope="module")
def templates() -> PromptTemplates:
    return load_templates()


def text_of(messages: list[dict[str, Any]]) -> str:
    (message,) = messages
    video, text = message["content"]
    assert (message["role"], video["type"], text["type"]) == ("user", "video", "text")
    return text["text"]


@pytest.mark.parametrize("task", Task)
@pytest.mark.parametrize("thinking", [False, True])
def test_prompts_ask_the_question_and_show_the_form(templates: PromptTemplates, task: Task, thinking: bool) -> None:
    text = text_of(build_messages(sample(task), templates, thinking=thinking))
    assert ("<think>" in text) == thinking
    assert "<answer>" in text and text == text.strip()
    assert ("<glue>" in text) == (task == Task.GROUNDED_QA)
    assert ("$5 for {this}?" in text) == (task != Task.CAPTIONING)
    assert ("(A) a $dog\n(B) a cat" in text) == (task in (Task.GROUNDED_QA, Task.MULTIPLE_CHOICE_QA))
    if task == Task.TRACKING:
        assert "8 frames" in text and "[0.100, 0.250, 0.500, 0.750]" in text and "0.510" not in text


@pytest.mark.parametrize("task", ANSWERS)
def test_target_texts(templates: PromptTemplates, task: Task) -> None:
    assert target_text(sample(task), templates) == ANSWERS[task]


def test_the_tracking_target_parses_back_to_its_boxes(templates: PromptTemplates) -> None:
    text = target_text(sample(Task.TRACKING), templates)
    assert text.startswith("<answer>[[0.100, 0.250, 0.500, 0.750], [")
    numbers = [float(number) for number in re.findall(r"\d\.\d+", text)]
    expected = [value for box in BOXES for value in (box.x0, box.y0, box.x1, box.y1)]
    assert numbers == pytest.approx(expected, abs=5e-4)


def test_the_video_part_carries_what_the_sample_fixes(templates: PromptTemplates) -> None:
    def video_part(of: VideoSample) -> dict[str, Any]:
        return build_messages(of, templates, thinking=False, video_options={"fps": 1.0, "max_frames": 64})[0][
            "content"
        ][0]

    plain = {"type": "video", "video": "a.mp4", "fps": 1.0, "max_frames": 64}
    assert video_part(sample(Task.QUALITY)) == plain
    assert video_part(sample(Task.TRACKING)) == {**plain, "min_frames": 8, "max_frames": 8}
    frames = tuple(f"{index}.jpg" for index in range(8))
    listed = video_part(sample(Task.TRACKING, video=frames, duration_s=2.0))
    assert (listed["video"], listed["image_fps"]) == (list(frames), 4.0)
    clipped = video_part(sample(Task.QUALITY, clip=Interval(2.0, 5.5)))
    assert clipped == {**plain, "start_s": 2.0, "end_s": 5.5}


def edited(tmp_path: Path, old: str, new: str) -> Path:
    original = (resources.files("megatron_vcr1.data") / "templates.toml").read_text(encoding="utf-8")
    assert old in original
    path = tmp_path / "templates.toml"
    path.write_text(original.replace(old, new), encoding="utf-8")
    return path


def test_a_users_file_replaces_wording_and_precision(tmp_path: Path) -> None:
    path = edited(tmp_path, "Find the part of the video in which this happens", "When is this, for $$5")
    path.write_text(path.read_text().replace("time_decimals = 2", "time_decimals = 1"))
    templates = load_templates(path)
    grounding = sample(Task.TEMPORAL_GROUNDING)
    assert text_of(build_messages(grounding, templates, thinking=True)).startswith('When is this, for $5: "$5 for')
    assert target_text(grounding, templates) == "<answer>12.5 to 17.0</answer>"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[quality]", "[qualtiy]", "'quality' is missing"),
        ("time_decimals = 2", "time_decimals = 2\nspace = 1", "'space' is unknown"),
        ("time_decimals = 2", "time_decimals = 2.5", "time_decimals must be a whole number from 0 to 6, got 2.5"),
        ('"$query"', '"$qeury"', r"temporal_grounding.answer: placeholder 'query' is missing"),
        ("$options", "$options $first_box", r"grounded_qa.answer: placeholder 'first_box' is unknown"),
        ("$options", "$ 5", "stray dollar sign"),
        ("[captioning]\nanswer", "[captioning]\nanwser", r"\[captioning\] must hold two texts"),
        ("[captioning]", "[captioning", "cannot be read as TOML"),
    ],
)
def test_mistakes_in_a_template_file_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_templates(edited(tmp_path, old, new))


def test_a_missing_template_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.toml: cannot be read"):
        load_templates(tmp_path / "absent.toml")


class FakeVideo:
    """A reader of one endless video: notes the options and gives the frames that they allow, each square."""

    def __init__(self, num_frames: int, side: int) -> None:
        self.num_frames, self.side = num_frames, side
        self.calls: list[dict[str, Any]] = []

    def __call__(self, path: str, *, factor: int, **options: Any) -> VideoFrames:
        self.calls.append(options)
        num_frames = min(self.num_frames, int(options.get("max_frames", 768)))
        share = int(options.get("total_pixels", 10**9)) * 2 / num_frames
        area = max(min(self.side**2, share), 1.05 * options.get("min_pixels", 16 * 28 * 28))
        side = max(int(area**0.5) // factor, 1) * factor
        frames = torch.zeros(num_frames, side, side, 3, dtype=torch.uint8)
        return VideoFrames(frames, tuple(range(num_frames)), float(num_frames), "fake")


def prepare(read: FakeVideo, templates: PromptTemplates, max_tokens: int, **changes: Any) -> Any:
    task = changes.pop("task", Task.QUALITY)
    return prepare_sample(
        sample(task, **changes),
        templates,
        tiny_processor(),
        thinking=False,
        max_tokens=max_tokens,
        video_options={"min_pixels": 256, "min_frames": 4},
        read=read,
    )


def num_text_tokens(templates: PromptTemplates, task: Task = Task.QUALITY) -> int:
    text = text_of(build_messages(sample(task), templates, thinking=False))
    return len(text) + len("user ") + len("assistant ") + 5  # <|im_start|> and the like


def test_a_prompt_that_fits_is_left_alone(templates: PromptTemplates) -> None:
    read = FakeVideo(16, 64)
    prepared = prepare(read, templates, max_tokens=num_text_tokens(templates) + 8 * 16)
    assert prepared.reduction is None and len(read.calls) == 1
    assert len(prepared.prompt.token_ids) == num_text_tokens(templates) + 8 * 16
    assert prepared.prompt.vision[0].grid_thw == (8, 8, 8)


def test_a_prompt_over_the_limit_lowers_its_pixels_first(templates: PromptTemplates) -> None:
    read = FakeVideo(16, 64)
    limit = num_text_tokens(templates) + 8 * 16 - 1
    prepared = prepare(read, templates, max_tokens=limit)
    assert len(read.calls) == 2 and "max_frames" not in read.calls[1]
    (vision,) = prepared.prompt.vision
    assert tuple(vision.frames.shape) == (16, 48, 48, 3)
    pads = int((prepared.prompt.token_ids == tiny_processor().video_token_id).sum())
    assert pads == vision.num_tokens(2) == 8 * 9 <= 8 * 16 - 1  # the video's tokens are whole
    assert prepared.reduction.endswith("16 frames became 16 of 48x48 pixels")
    assert f"lowered to {len(prepared.prompt.token_ids)}" in prepared.reduction


def test_then_its_frames(templates: PromptTemplates) -> None:
    read = FakeVideo(16, 64)
    prepared = prepare(read, templates, max_tokens=num_text_tokens(templates) + 6)
    assert len(prepared.prompt.vision[0].frames) == 10  # 5 pairs of at least 1.05 tokens each fit into 6 tokens
    assert len(prepared.prompt.token_ids) <= num_text_tokens(templates) + 6
    assert prepared.reduction.endswith("16 frames became 10 of 16x16 pixels")


def test_what_cannot_fit_names_the_sample(templates: PromptTemplates) -> None:
    with pytest.raises(PromptTooLongError, match=r"sample a: \d+ prompt tokens, .* allow more than 20"):
        prepare(FakeVideo(16, 64), templates, max_tokens=20)


def test_tracking_keeps_its_frames_or_fails(templates: PromptTemplates) -> None:
    text = num_text_tokens(templates, Task.TRACKING)
    prepared = prepare(FakeVideo(100, 64), templates, max_tokens=text + 4, task=Task.TRACKING)
    assert len(prepared.prompt.vision[0].frames) == 8
    with pytest.raises(PromptTooLongError):
        prepare(FakeVideo(100, 64), templates, max_tokens=text + 3, task=Task.TRACKING)
    with pytest.raises(VideoError, match="it gives 6 frames, tracking has 8 boxes"):
        prepare(FakeVideo(6, 64), templates, max_tokens=text + 100, task=Task.TRACKING)


@pytest.mark.parametrize("num_frames", [4, 24, 768])
@pytest.mark.parametrize("max_video_tokens", [8, 100, 5000])
def test_smaller_video_never_exceeds_what_it_was_given(num_frames: int, max_video_tokens: int) -> None:
    processor = tiny_processor()
    options = {"min_pixels": 256, "min_frames": 4}
    changes = smaller_video(num_frames, max_video_tokens, processor, options)
    video = FakeVideo(num_frames, 4096)("v", factor=processor.factor, **{**options, **changes})
    tokens = len(video.frames) // 2 * (video.frames.shape[1] // processor.factor) ** 2
    assert tokens <= max_video_tokens


def test_a_clip_shows_its_part_of_a_real_file_only(templates: PromptTemplates, tmp_path: Path) -> None:
    brightness = np.arange(24, dtype=np.uint8) * 10  # frame k, shown at k / 2 seconds, is 10 k bright
    write_video(tmp_path / "v.mp4", np.broadcast_to(brightness[:, None, None, None], (24, 64, 64, 3)).copy(), fps=2)
    prepared = prepare_sample(
        sample(Task.QUALITY, video=str(tmp_path / "v.mp4"), clip=Interval(3.0, 7.0)),
        templates,
        tiny_processor(),
        thinking=False,
        max_tokens=2000,
        video_options={"min_pixels": 1024},
    )
    (vision,) = prepared.prompt.vision
    shown = vision.frames.float().mean(dim=(1, 2, 3)) / 10
    assert shown.round().tolist() == [6, 7, 8, 9, 10, 11, 12, 13]
    assert vision.seconds_per_grid == pytest.approx(1.0)
