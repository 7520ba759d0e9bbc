"""Preparation of a sample: its messages are encoded, with smaller media if the prompt exceeds the token limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_vcr1.data.encoding import EncodedPrompt, VisionInput, encode_messages
from megatron_vcr1.data.frame_rules import PixelOptions
from megatron_vcr1.data.images import read_image
from megatron_vcr1.data.messages import Message
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.templates import PromptTemplates, build_messages
from megatron_vcr1.data.video import VideoError, VideoFrames, read_frames
from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import task_of
from megatron_vcr1.types import Sample


class PromptTooLongError(ValueError):
    """Raised if a prompt does not fit even with its media at the smallest size; the message names the sample."""


CheckPromptFn = Callable[[EncodedPrompt], None]
"""Raises UserError if the model cannot take a prompt."""


@dataclass(frozen=True, slots=True)
class PreparedSample:
    """A sample whose prompt is ready for the rollout and for training."""

    sample: Sample
    prompt: EncodedPrompt
    reduction: str | None
    """Description of how the media were reduced to make the prompt fit; None if they were not."""


def prepare_sample(
    sample: Sample,
    templates: PromptTemplates,
    processor: PromptProcessor,
    *,
    thinking: bool,
    max_tokens: int,
    check: CheckPromptFn | None = None,
    video_options: Mapping[str, float] | None = None,
    read: Callable[..., VideoFrames] = read_frames,
    read_image: Callable[[str], Tensor] = read_image,
) -> PreparedSample:
    """Encode the prompt of a sample within a token limit. Media that take too many tokens are read again, smaller.

    The token sequence itself is never cut. Images and frames are made smaller; when the frames of a video have the
    smallest size, their number is reduced.

    Args:
        sample: the sample.
        templates: the prompt templates.
        processor: the model's processor.
        thinking: whether to ask for reasoning before the answer.
        max_tokens: token limit of the prompt, text and media together.
        check: checks the prompt that fits into `max_tokens`.
        video_options: options of `read_frames`, for each video.
        read: function that decodes a video, with the signature of `read_frames`.
        read_image: function that decodes an image, with the signature of `images.read_image`.

    Raises:
        VideoError: a video or image cannot be read, or a video has fewer frames than tracking has boxes.
        PromptTooLongError: the prompt does not fit at any size, or `check` refuses it; names the sample.
    """
    options = dict(video_options or {})

    def messages(limits: Sequence[Mapping[str, int]] = ()) -> list[dict[str, Any]]:
        return build_messages(sample, templates, thinking=thinking, video_options=options, limits=limits)

    def encode(messages: Sequence[Message]) -> EncodedPrompt:
        return encode_messages(messages, processor, read=read, read_image=read_image)

    prompt = encode(messages())
    num_tokens = len(prompt.token_ids)
    reduction = None
    if num_tokens > max_tokens:
        full = prompt.vision
        num_text_tokens = len(processor.tokenize_conversation(messages())) - len(full)
        limits = _limits(prompt, max(max_tokens - num_text_tokens, 1), processor, options)
        prompt = encode(messages(limits))
        if len(prompt.token_ids) > max_tokens:
            raise PromptTooLongError(_too_long(sample, num_tokens, len(prompt.token_ids), max_tokens))
        changes = "; ".join(_size_change(before, after) for before, after in zip(full, prompt.vision, strict=True))
        reduction = f"{num_tokens} prompt tokens lowered to {len(prompt.token_ids)}: {changes}"
    if check is not None:
        try:
            check(prompt)
        except UserError as error:
            raise PromptTooLongError(f"sample {sample.id}: {error}") from error
    if sample.video is not None:
        num_frames = len(prompt.vision[sample.media.index(sample.video)].frames)
        if fault := task_of(sample).frames_fault(sample, num_frames):
            raise VideoError(sample.video.path, fault)
    return PreparedSample(sample, prompt, reduction)


def _limits(
    prompt: EncodedPrompt, max_media_tokens: int, processor: PromptProcessor, options: Mapping[str, float]
) -> list[dict[str, int]]:
    """Return options for each image and video with which they fit. All of them shrink by the same factor."""
    sizes = [item.num_tokens(processor.merge_size) for item in prompt.vision]
    sizes = [size + _num_stamp_tokens(item, processor) for size, item in zip(sizes, prompt.vision, strict=True)]
    limits = []
    for item, size in zip(prompt.vision, sizes, strict=True):
        max_item_tokens = max_media_tokens * size // sum(sizes)
        if item.seconds_per_grid is None:
            limits.append({"max_pixels": max(max_item_tokens * processor.factor**2, processor.min_pixels)})
        else:
            step_tokens = _num_stamp_tokens(item, processor) // item.grid_thw[0]
            limits.append(
                reduced_video_options(len(item.frames), max_item_tokens, processor, options, stamp_tokens=step_tokens)
            )
    return limits


def _num_stamp_tokens(item: VisionInput, processor: PromptProcessor) -> int:
    """Return the number of tokens of a video's time stamps, or a little more: every stamp counts like the last one."""
    if item.seconds_per_grid is None:
        return 0
    num_steps = item.grid_thw[0]
    return num_steps * (len(processor.tokenize_video([num_steps * item.seconds_per_grid])) - 1)


def _too_long(sample: Sample, num_tokens: int, num_smallest: int, max_tokens: int) -> str:
    if not sample.media:
        return f"sample {sample.id}: its text has {num_tokens} tokens; allow more than {max_tokens}, or shorten it"
    return (
        f"sample {sample.id}: {num_tokens} prompt tokens, {num_smallest} at the smallest video size; allow more than "
        f"{max_tokens}, or lower the video's min_pixels or min_frames"
    )


def reduced_video_options(
    num_frames: int,
    max_video_tokens: int,
    processor: PromptProcessor,
    options: Mapping[str, float],
    *,
    stamp_tokens: int = 0,
) -> dict[str, int]:
    """Return options that reduce a video of `num_frames` to at most `max_video_tokens`, if the minimum sizes allow it.

    A video within `total_pixels` takes at most total_pixels / factor**2 tokens, unless its frames are at their minimum
    of `min_pixels` (plus 5 %, see `max_pixels_per_frame`). In that case the number of frames is reduced.

    Args:
        num_frames: number of frames of the video at its full size.
        max_video_tokens: token limit of the video, its time stamps included.
        processor: the model's processor.
        options: options of `read_frames` with which the video was read.
        stamp_tokens: number of text tokens before and after each temporal patch.
    """
    depth, token_pixels = processor.temporal_patch_size, processor.factor**2
    least_frame_pixels = options.get("min_pixels")
    if least_frame_pixels is None:
        # Rules without a minimum: keep 16 tokens per temporal patch, and drop frames before going below.
        least_frame_pixels = processor.frame_rules.with_defaults(PixelOptions()).min_pixels or 16 * token_pixels
    least_pixels = int(least_frame_pixels * 1.05) + stamp_tokens * token_pixels  # of a temporal patch
    most_frames = depth * (max(max_video_tokens, 1) * token_pixels // least_pixels)
    changes: dict[str, int] = {}
    if most_frames < num_frames:
        num_frames = max(most_frames, int(options.get("min_frames", 4)))
        changes["max_frames"] = num_frames
    num_steps = -(-num_frames // depth)
    vision_tokens = max(max_video_tokens - stamp_tokens * num_steps, 1)
    # Half a temporal patch takes as many tokens as a whole one, but the budget may not count it.
    return {"total_pixels": vision_tokens * token_pixels * (num_frames // depth) // num_steps, **changes}


def _size_change(before: VisionInput, after: VisionInput) -> str:
    num_frames, height, width, _ = after.frames.shape
    if after.seconds_per_grid is None:
        return f"the image became {width}x{height} pixels"
    return f"{len(before.frames)} frames became {num_frames} of {width}x{height} pixels"
