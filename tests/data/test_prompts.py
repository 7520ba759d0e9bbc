from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from megatron_vcr1.data.frame_rules import PixelOptions, WholeVideoRules
from megatron_vcr1.data.prompts import PromptTooLongError, prepare_sample, reduced_video_options
from megatron_vcr1.data.synthesize import write_video
from megatron_vcr1.data.templates import PromptTemplates, build_messages, load_templates
from megatron_vcr1.data.video import VideoError, VideoFrames
from megatron_vcr1.types import Image, Interval, Video
from tests.data.prompt_samples import sample, text_of
from tests.data.tiny_processor import tiny_processor


@pytest.fixture(scope="module")
def templates() -> PromptTemplates:
    return load_templates()


class FakeVideo:
    """A reader that records its options and returns square frames of a made-up video, within the options' bounds."""

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
    task = changes.pop("task", "quality")
    return prepare_sample(
        sample(task, **changes),
        templates,
        tiny_processor(),
        thinking=False,
        max_tokens=max_tokens,
        video_options={"min_pixels": 256, "min_frames": 4},
        read=read,
    )


def num_text_tokens(templates: PromptTemplates, task: str = "quality") -> int:
    text = text_of(build_messages(sample(task), templates, thinking=False))
    return len(text) + len("user ") + len("assistant ") + 5  # special tokens are one token each


def test_a_prompt_that_fits_is_not_reduced(templates: PromptTemplates) -> None:
    read = FakeVideo(16, 64)
    prepared = prepare(read, templates, max_tokens=num_text_tokens(templates) + 8 * 16)
    assert prepared.reduction is None and len(read.calls) == 1
    assert len(prepared.prompt.token_ids) == num_text_tokens(templates) + 8 * 16
    assert prepared.prompt.vision[0].grid_thw == (8, 8, 8)


def test_a_prompt_over_the_limit_reduces_its_pixels_first(templates: PromptTemplates) -> None:
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


def test_frames_are_reduced_after_their_pixels(templates: PromptTemplates) -> None:
    read = FakeVideo(16, 64)
    prepared = prepare(read, templates, max_tokens=num_text_tokens(templates) + 6)
    assert len(prepared.prompt.vision[0].frames) == 10  # 5 pairs of at least 1.05 tokens each fit into 6 tokens
    assert len(prepared.prompt.token_ids) <= num_text_tokens(templates) + 6
    assert prepared.reduction.endswith("16 frames became 10 of 16x16 pixels")


def test_a_prompt_that_cannot_fit_names_the_sample(templates: PromptTemplates) -> None:
    with pytest.raises(PromptTooLongError, match=r"sample a: \d+ prompt tokens, .* allow more than 20"):
        prepare(FakeVideo(16, 64), templates, max_tokens=20)


def test_tracking_keeps_its_number_of_frames_or_fails(templates: PromptTemplates) -> None:
    text = num_text_tokens(templates, "tracking")
    prepared = prepare(FakeVideo(100, 64), templates, max_tokens=text + 4, task="tracking")
    assert len(prepared.prompt.vision[0].frames) == 8
    with pytest.raises(PromptTooLongError):
        prepare(FakeVideo(100, 64), templates, max_tokens=text + 3, task="tracking")
    with pytest.raises(VideoError, match="the video has 6 frames, but tracking has 8 boxes"):
        prepare(FakeVideo(6, 64), templates, max_tokens=text + 100, task="tracking")


def test_several_media_shrink_by_the_same_factor(templates: PromptTemplates, tmp_path: Path) -> None:
    PIL.Image.new("RGB", (128, 128)).save(tmp_path / "a.png")
    media = (Video("a.mp4"), Video("b.mp4"), Image(str(tmp_path / "a.png")))
    full = prepare(FakeVideo(16, 64), templates, max_tokens=1000, media=media)
    sizes = [item.num_tokens(2) for item in full.prompt.vision]
    assert sizes == [128, 128, 64] and full.reduction is None
    limit = len(full.prompt.token_ids) - 160  # half of the vision tokens
    prepared = prepare(FakeVideo(16, 64), templates, max_tokens=limit, media=media)
    assert limit - 80 < len(prepared.prompt.token_ids) <= limit
    assert [item.num_tokens(2) for item in prepared.prompt.vision] == [32, 32, 25]
    assert prepared.reduction.endswith(
        "16 frames became 16 of 32x32 pixels; 16 frames became 16 of 32x32 pixels; the image became 80x80 pixels"
    )


def test_a_text_that_is_too_long_cannot_be_reduced(templates: PromptTemplates) -> None:
    question = {"task": "multiple_choice_qa", "media": ()}
    assert prepare(FakeVideo(16, 64), templates, max_tokens=1000, **question).prompt.vision == ()
    with pytest.raises(PromptTooLongError, match=r"sample a: its text has \d+ tokens; allow more than 20, or shorten"):
        prepare(FakeVideo(16, 64), templates, max_tokens=20, **question)


@pytest.mark.parametrize("num_frames", [4, 24, 768])
@pytest.mark.parametrize("max_video_tokens", [8, 100, 5000])
def test_reduced_video_options_keep_the_token_limit(num_frames: int, max_video_tokens: int) -> None:
    processor = tiny_processor()
    options = {"min_pixels": 256, "min_frames": 4}
    changes = reduced_video_options(num_frames, max_video_tokens, processor, options)
    video = FakeVideo(num_frames, 4096)("v", factor=processor.factor, **{**options, **changes})
    tokens = len(video.frames) // 2 * (video.frames.shape[1] // processor.factor) ** 2
    assert tokens <= max_video_tokens


@pytest.mark.parametrize("num_frames", [5, 24, 61])
@pytest.mark.parametrize("max_video_tokens", [60, 200, 1500])
def test_time_stamps_count_in_the_token_limit(
    templates: PromptTemplates, num_frames: int, max_video_tokens: int
) -> None:
    rules = WholeVideoRules(min_video_pixels=4096, max_video_pixels=2**24)
    processor = replace(tiny_processor(16), timestamps_as_text=True, frame_rules=rules)

    def read(path: str, *, factor: int, rules: WholeVideoRules, **options: Any) -> VideoFrames:
        number = min(num_frames, options.get("max_frames", num_frames))
        pixels = PixelOptions(options.get("total_pixels"), options.get("min_pixels"))
        height, width = rules.frame_size(number, 480, 640, factor=factor, options=pixels)
        times = tuple(2.0 * index for index in range(number))
        return VideoFrames(torch.zeros(number, height, width, 3, dtype=torch.uint8), times, 2.0 * number, "fake")

    limit = num_text_tokens(templates) + max_video_tokens
    prepared = prepare_sample(
        sample("quality"),
        templates,
        processor,
        thinking=False,
        max_tokens=limit,
        video_options={"min_frames": 2},
        read=read,
    )
    assert len(prepared.prompt.token_ids) <= limit
    (video,) = prepared.prompt.vision
    assert video.num_tokens(2) * 4 >= video.grid_thw[0] * 16  # a temporal patch keeps a quarter of 16 tokens at least


def test_only_the_clip_of_a_file_is_shown(templates: PromptTemplates, tmp_path: Path) -> None:
    brightness = np.arange(24, dtype=np.uint8) * 10  # frame k appears at k / 2 seconds and has brightness 10 k
    write_video(tmp_path / "v.mp4", np.broadcast_to(brightness[:, None, None, None], (24, 64, 64, 3)).copy(), fps=2)
    prepared = prepare_sample(
        sample("quality", video=str(tmp_path / "v.mp4"), clip=Interval(3.0, 7.0)),
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


def test_templates_that_put_the_text_first_only_change_the_order_of_tokens() -> None:
    processor = tiny_processor()
    usual, text_first = (
        prepare(FakeVideo(16, 64), load_templates(name), 10_000).prompt.token_ids.tolist()
        for name in ("default", "videochat_r1")
    )
    start = len(processor.tokenizer("<|im_start|>user ").input_ids)
    first_pad, num_pads = usual.index(processor.video_token_id), usual.count(processor.video_token_id)
    vision = usual[start : first_pad + num_pads + 1]  # from <|vision_start|> to <|vision_end|>
    end = usual.index(processor.tokenizer("<|im_end|>").input_ids[0])
    text = usual[start + len(vision) : end]
    assert text_first == [*usual[:start], *text, *vision, *usual[end:]]
