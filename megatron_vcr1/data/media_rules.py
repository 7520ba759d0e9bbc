"""Rules of a model family for the images and videos in its prompts."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vcr1.data.frame_rules import PER_FRAME_RULES, FrameRules


@dataclass(frozen=True, slots=True)
class MediaRules:
    """How a family prepares images and videos. A model's processor files and the user's settings override the sizes.

    Attributes:
        timestamps_as_text: whether every temporal patch of a video has its own run of pads, after a time stamp in the
            text. Otherwise a video has a single run of pads, and its positions carry the time.
        frames: number and size of a video's frames.
        video_patch_size: patch size of videos where a model's processor files name none.
    """

    timestamps_as_text: bool = False
    frames: FrameRules = PER_FRAME_RULES
    video_patch_size: int = 14
