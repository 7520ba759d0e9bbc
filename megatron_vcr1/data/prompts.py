"""Preparation of a sample: its messages are encoded, with a smaller video if the prompt exceeds the token limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megatron_vcr1.data.encoding import EncodedPrompt, encode_messages
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.templates import PromptTemplates, build_messages
from megatron_vcr1.data.video import VideoError, VideoFrames, read_frames
from megatron_vcr1.tasks import task_of
from megatron_vcr1.types import VideoSample


class PromptTooLongError(ValueError):
    """Raised if a prompt does not fit even with its video at the smallest size; the message names the sample."""


@dataclass(frozen=True, slots=True)
class PreparedSample:
    """A sample whose prompt is ready for the rollout and for training."""

    sample: VideoSample
    prompt: EncodedPrompt
    reduction: str | None
    """Description of how the video was reduced to make the prompt fit; None if it was not."""


def prepare_sample(
    sample: VideoSample,
    templates: PromptTemplates,
    processor: PromptProcessor,
    *,
    thinking: bool,
    max_tokens: int,
    video_options: Mapping[str, float] | None = None,
    read: Callable[..., VideoFrames] = read_frames,
) -> PreparedSample:
    """Encode the prompt of a sample within a token limit. A video that is too long is decoded again at a smaller size.

    The token sequence itself is never cut. First the video's frames are made smaller; when they have the smallest size,
    their number is reduced.

    Args:
        sample: the sample.
        templates: the prompt templates.
        processor: the model's processor.
        thinking: whether to ask for reasoning before the answer.
        max_tokens: token limit of the prompt, text and video together.
        video_options: options of `read_frames`.
        read: function that decodes a video, with the signature of `read_frames`.

    Raises:
        VideoError: the video cannot be read, or has fewer frames than tracking has boxes.
        PromptTooLongError: the prompt does not fit at any size; names the sample.
    """
    options = dict(video_options or {})

    def encode() -> EncodedPrompt:
        messages = build_messages(sample, templates, thinking=thinking, video_options=options)
        return encode_messages(messages, processor, read=read)

    prompt = encode()
    num_tokens = len(prompt.token_ids)
    reduction = None
    if num_tokens > max_tokens:
        num_text_tokens = num_tokens - sum(vision.num_tokens(processor.merge_size) for vision in prompt.vision)
        num_frames = len(prompt.vision[0].frames)
        options |= reduced_video_options(num_frames, max_tokens - num_text_tokens, processor, options)
        prompt = encode()
        reduction = f"{num_tokens} prompt tokens lowered to {len(prompt.token_ids)}: {_size_change(num_frames, prompt)}"
        if len(prompt.token_ids) > max_tokens:
            raise PromptTooLongError(
                f"sample {sample.id}: {num_tokens} prompt tokens, {len(prompt.token_ids)} at the smallest video size; "
                f"allow more than {max_tokens}, or lower the video's min_pixels or min_frames"
            )
    if fault := task_of(sample).frames_fault(sample, len(prompt.vision[0].frames)):
        raise VideoError(sample.video, fault)
    return PreparedSample(sample, prompt, reduction)


def reduced_video_options(
    num_frames: int, max_video_tokens: int, processor: PromptProcessor, options: Mapping[str, float]
) -> dict[str, int]:
    """Return options that reduce a video of `num_frames` to at most `max_video_tokens`, if the minimum sizes allow it.

    A video within `total_pixels` takes at most total_pixels / factor**2 tokens, unless its frames are at their minimum
    of `min_pixels` (plus 5 %, see `max_pixels_per_frame`). In that case the number of frames is reduced.
    """
    pixels = max(max_video_tokens, 1) * processor.factor**2
    least_frame_pixels = int(options.get("min_pixels", 16 * 28 * 28) * 1.05)
    most_frames = processor.temporal_patch_size * pixels // least_frame_pixels
    if most_frames >= num_frames:
        return {"total_pixels": pixels}
    least_frames = int(options.get("min_frames", 4))
    return {"total_pixels": pixels, "max_frames": max(most_frames - most_frames % 2, least_frames)}


def _size_change(num_frames: int, prompt: EncodedPrompt) -> str:
    frames = prompt.vision[0].frames
    return f"{num_frames} frames became {len(frames)} of {frames.shape[2]}x{frames.shape[1]} pixels"
