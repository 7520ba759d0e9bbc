"""Rules of a model family for the images and videos in its prompts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MediaRules:
    """How a family prepares images and videos. A model's processor files and the user's settings override the sizes.

    Areas are in language-model tokens: one token covers a square of patch_size * merge_size pixels.

    Attributes:
        timestamps_as_text: whether every temporal patch of a video has its own run of pads, after a time stamp in the
            text. Otherwise a video has a single run of pads, and its positions carry the time.
        min_image_tokens, max_image_tokens: bounds on an image's size.
        min_frame_tokens, max_frame_tokens: bounds on the size of a frame of a video.
    """

    timestamps_as_text: bool
    min_image_tokens: int
    max_image_tokens: int
    min_frame_tokens: int
    max_frame_tokens: int
