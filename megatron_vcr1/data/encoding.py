"""Encoding of chat messages for the model: token ids with expanded vision pads, and resized frames."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_vcr1.data.images import read_image
from megatron_vcr1.data.messages import IMAGE_OPTIONS, VIDEO_OPTIONS, Message, MessageError, checked_parts
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.resize import resize_frame, smart_resize
from megatron_vcr1.data.video import VideoError, VideoFrames, read_frames
from megatron_vcr1.data.video_types import OptionError


@dataclass(frozen=True, slots=True)
class VisionInput:
    """An image or a video, ready for the vision tower."""

    frames: Tensor
    """uint8 [num_frames, height, width, 3], resized: height and width are multiples of patch_size * merge_size."""
    grid_thw: tuple[int, int, int]
    """Number of patches in time, height and width."""
    seconds_per_grid: float | None
    """Video time that one step of the grid's time axis covers, in seconds; None for an image."""

    def num_tokens(self, merge_size: int) -> int:
        """Return the number of language-model tokens that this input takes."""
        time, height, width = self.grid_thw
        return time * height * width // merge_size**2


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the model takes it: token ids and vision inputs."""

    token_ids: Tensor
    """int64 [num_tokens]; every vision pad is repeated once for each token that it stands for."""
    vision: tuple[VisionInput, ...]
    """Images and videos, in the order of their pads in `token_ids`."""

    def frames_on(self, device: str) -> EncodedPrompt:
        """Return the same prompt with its frames on a device; on "meta", only their shapes are kept."""
        return replace(self, vision=tuple(replace(item, frames=item.frames.to(device)) for item in self.vision))


def encode_messages(
    messages: Sequence[Message],
    processor: PromptProcessor,
    *,
    add_generation_prompt: bool = True,
    read: Callable[..., VideoFrames] = read_frames,
    read_image: Callable[[str], Tensor] = read_image,
    max_vision_tokens: int | None = None,
) -> EncodedPrompt:
    """Encode a conversation with images and videos exactly as transformers' processor of the model's family does.

    Control tokens in its texts, such as `<|im_end|>` and `<|video_pad|>`, are encoded as text; transformers takes them
    for the end of a turn or for an image.

    Args:
        messages: chat messages. `content` is a string or a list of `{"type": "text", "text": str}`,
            `{"type": "image", "image": path}` and `{"type": "video", "video": path or list of frame paths}` parts. An
            image part may set min_pixels and max_pixels, a video part any of VIDEO_OPTIONS (see `read_frames`).
        processor: the model's tokenizer, chat template and patch sizes.
        add_generation_prompt: whether to end with the beginning of the assistant's turn.
        read: function that decodes a video, with the signature of `read_frames`.
        read_image: function that decodes an image, with the signature of `images.read_image`.
        max_vision_tokens: limit on the tokens of all images and videos together. None: no limit.

    Raises:
        VideoError: an image or video cannot be read; names the file and the reason.
        MessageError: a part is malformed, the chat template refuses the conversation, or the images and videos have
            more than `max_vision_tokens`. The part with which they do is the last one that is decoded.
    """
    vision: list[VisionInput] = []
    pads: list[Tensor] = []
    for where, part in checked_parts(messages):
        if part["type"] == "image":
            vision.append(_encode_image(part, processor, read_image, where))
            pads.append(torch.tensor([processor.image_token_id]))
        elif part["type"] == "video":
            video = _read_video(part, processor, read, where)
            vision.append(encode_frames(video, processor))
            pads.append(processor.tokenize_video(step_times_s(video, processor.temporal_patch_size)))
        num_tokens = sum(item.num_tokens(processor.merge_size) for item in vision)
        if max_vision_tokens is not None and num_tokens > max_vision_tokens:
            raise MessageError(
                f"{where}: the images and videos up to here take {num_tokens} tokens; at most {max_vision_tokens} are "
                "supported"
            )
    token_ids = processor.tokenize_conversation(messages, add_generation_prompt=add_generation_prompt)
    return EncodedPrompt(_expand_pads(token_ids, vision, pads, processor), tuple(vision))


def _expand_pads(
    token_ids: Tensor, vision: Sequence[VisionInput], pads: Sequence[Tensor], processor: PromptProcessor
) -> Tensor:
    """Replace the pad of each image and video by its tokens.

    Args:
        token_ids: int64 [num_text_tokens], with one pad for each input.
        vision: images and videos in the order of their pads.
        pads: for each of them, int64 [tokens]: its text and one pad for each run of pads; the runs have equal lengths.
        processor: the model's processor, which knows the pads.

    Returns:
        int64 [num_tokens].

    Raises:
        MessageError: the number of pads differs from the number of inputs; the chat template is for another model.
    """
    places = _is_pad(token_ids, processor).nonzero()[:, 0].tolist()
    if len(places) != len(vision):
        raise MessageError(
            f"the chat template wrote {len(places)} vision tokens for {len(vision)} images and videos; "
            "use the model's own chat template"
        )
    pieces, start = [], 0
    for place, item, tokens in zip(places, vision, pads, strict=True):
        is_pad = _is_pad(tokens, processor)
        repeats = torch.ones_like(tokens)
        repeats[is_pad] = item.num_tokens(processor.merge_size) // int(is_pad.sum())
        pieces += [token_ids[start:place], tokens.repeat_interleave(repeats)]
        start = place + 1
    return torch.cat([*pieces, token_ids[start:]])


def _is_pad(token_ids: Tensor, processor: PromptProcessor) -> Tensor:
    return (token_ids == processor.image_token_id) | (token_ids == processor.video_token_id)


def encode_frames(video: VideoFrames, processor: PromptProcessor) -> VisionInput:
    """Turn a decoded video into an input of the vision tower.

    If the number of frames is odd, the last temporal patch contains the last frame twice.
    """
    num_frames, height, width, _ = video.frames.shape
    grid_t = -(-num_frames // processor.temporal_patch_size)
    grid_thw = (grid_t, height // processor.patch_size, width // processor.patch_size)
    seconds_per_grid = processor.temporal_patch_size * video.duration_s / num_frames
    return VisionInput(video.frames, grid_thw, seconds_per_grid)


def step_times_s(video: VideoFrames, temporal_patch_size: int) -> list[float]:
    """Return the time of each temporal patch: the mean of its first and its last frame's time stamps, in seconds."""
    times = [*video.timestamps_s]
    times += times[-1:] * (-len(times) % temporal_patch_size)
    return [
        (first + last) / 2
        for first, last in zip(
            times[::temporal_patch_size], times[temporal_patch_size - 1 :: temporal_patch_size], strict=True
        )
    ]


def _read_video(part: Message, processor: PromptProcessor, read: Callable[..., VideoFrames], where: str) -> VideoFrames:
    options = _options(part, VIDEO_OPTIONS)
    try:
        return read(part["video"], factor=processor.factor, rules=processor.frame_rules, **options)
    except OptionError as error:
        raise MessageError(f"{where}: {error}") from error


def _encode_image(part: Message, processor: PromptProcessor, read: Callable[[str], Tensor], where: str) -> VisionInput:
    bounds = {"min_pixels": processor.min_pixels, "max_pixels": processor.max_pixels}
    bounds |= _options(part, IMAGE_OPTIONS)
    if bounds["min_pixels"] > bounds["max_pixels"]:
        raise MessageError(f"{where}: min_pixels {bounds['min_pixels']} is above max_pixels {bounds['max_pixels']}")
    image = read(part["image"])
    try:
        height, width = smart_resize(*image.shape[:2], factor=processor.factor, **bounds)
    except ValueError as error:
        raise VideoError(part["image"], str(error)) from error
    grid_thw = (1, height // processor.patch_size, width // processor.patch_size)
    return VisionInput(resize_frame(image, height, width).unsqueeze(0), grid_thw, None)


def _options(part: Message, names: Iterable[str]) -> dict[str, Any]:
    return {name: part[name] for name in names if name in part}
