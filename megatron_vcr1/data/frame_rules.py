"""The rules of published video processors for the number and the size of a video's frames."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from megatron_vcr1.data.resize import (
    MAX_FRAME_PIXELS,
    PIXELS_PER_TOKEN,
    TEMPORAL_PATCH_SIZE,
    max_pixels_per_frame,
    smart_resize,
    smart_resize_video,
)


@dataclass(frozen=True, slots=True)
class PixelOptions:
    """The pixel options of `read_frames`; None is the default of the rules.

    Attributes:
        total_pixels: pixel budget of the video, counted over one frame of each temporal patch.
        min_pixels, max_pixels: bounds on the number of pixels of one frame.
    """

    total_pixels: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None


class FrameRules(ABC):
    """The rules of a processor. Implementations are frozen dataclasses: rules are part of the key of cached videos.

    Attributes:
        frame_multiple: the number of sampled frames is rounded down to a multiple of it.
    """

    frame_multiple: ClassVar[int]

    @abstractmethod
    def with_defaults(self, options: PixelOptions) -> PixelOptions:
        """Replace options that are None by the defaults of the rules; a bound that stays None does not exist."""

    @abstractmethod
    def frame_size(
        self, num_frames: int, height: int, width: int, *, factor: int, options: PixelOptions
    ) -> tuple[int, int]:
        """Return the height and width of a video's frames after resizing.

        Args:
            num_frames: number of sampled frames.
            height, width: original size in pixels.
            factor: patch_size * merge_size; both sides are multiples of it.
            options: the pixel options.

        Raises:
            ValueError: the aspect ratio is over 200.
        """

    @abstractmethod
    def most_pixels(self, num_frames: int, options: PixelOptions) -> int:
        """Return the largest number of pixels that all frames of a video have together."""

    def with_file_bounds(self, low: int | None, high: int | None, max_frame_pixels: int | None) -> FrameRules:
        """Return these rules with the bounds of a model's processor files.

        Args:
            low, high: bounds on the pixels of all frames of a video together; None: the file sets none.
            max_frame_pixels: bound on the pixels of one frame; None: the file sets none.
        """
        return self


@dataclass(frozen=True, slots=True)
class PerFrameRules(FrameRules):
    """Bounds on the pixels of each frame, and an even number of frames: Qwen2-VL and Qwen2.5-VL.

    The bounds in these models' files are those of transformers' processor, which their published preprocessing ignores.
    """

    frame_multiple = TEMPORAL_PATCH_SIZE

    def with_defaults(self, options: PixelOptions) -> PixelOptions:
        return PixelOptions(*_per_frame_bounds(options))

    def frame_size(
        self, num_frames: int, height: int, width: int, *, factor: int, options: PixelOptions
    ) -> tuple[int, int]:
        _, least, _ = _per_frame_bounds(options)
        most = self.most_pixels(num_frames, options) // num_frames
        return smart_resize(height, width, factor=factor, min_pixels=least, max_pixels=most)

    def most_pixels(self, num_frames: int, options: PixelOptions) -> int:
        total, least, most = _per_frame_bounds(options)
        return num_frames * max_pixels_per_frame(num_frames, total_pixels=total, min_pixels=least, max_pixels=most)


@dataclass(frozen=True, slots=True)
class WholeVideoRules(FrameRules):
    """Bounds on the pixels of all frames together, and any number of frames: Qwen3-VL.

    Attributes:
        min_video_pixels, max_video_pixels: the bounds, unless the options set others.
        max_frame_pixels: bound on the pixels of one frame, unless the options set another; None: no bound.
    """

    min_video_pixels: int
    max_video_pixels: int
    max_frame_pixels: int | None = None

    frame_multiple = 1

    def with_defaults(self, options: PixelOptions) -> PixelOptions:
        return PixelOptions(
            self.max_video_pixels // TEMPORAL_PATCH_SIZE if options.total_pixels is None else options.total_pixels,
            options.min_pixels,
            self.max_frame_pixels if options.max_pixels is None else options.max_pixels,
        )

    def frame_size(
        self, num_frames: int, height: int, width: int, *, factor: int, options: PixelOptions
    ) -> tuple[int, int]:
        most = self.most_pixels(num_frames, options)
        least = self.min_video_pixels if options.min_pixels is None else num_frames * options.min_pixels
        least = min(least, most)
        return smart_resize_video(num_frames, height, width, factor=factor, min_pixels=least, max_pixels=most)

    def most_pixels(self, num_frames: int, options: PixelOptions) -> int:
        total = options.total_pixels
        most_of_frame = self.max_frame_pixels if options.max_pixels is None else options.max_pixels
        most = self.max_video_pixels if total is None else total * TEMPORAL_PATCH_SIZE
        if most_of_frame is not None:
            most = min(most // num_frames, most_of_frame) * num_frames
        least = 1 if options.min_pixels is None else options.min_pixels
        if options == PixelOptions() and self.max_frame_pixels is not None:
            least = self.min_video_pixels  # as in transformers, although this is the bound on all frames together
        return max(most, num_frames * int(least * 1.05))  # as in `max_pixels_per_frame`

    def with_file_bounds(self, low: int | None, high: int | None, max_frame_pixels: int | None) -> WholeVideoRules:
        return replace(
            self,
            min_video_pixels=self.min_video_pixels if low is None else low,
            max_video_pixels=self.max_video_pixels if high is None else high,
            max_frame_pixels=max_frame_pixels,
        )


PER_FRAME_RULES = PerFrameRules()


def rules_to_json(rules: FrameRules) -> dict[str, Any]:
    """Return rules as a JSON object, for `rules_from_json`: their kind and fields."""
    return {"kind": type(rules).__name__, **asdict(rules)}  # type: ignore[call-overload]  # the base is no dataclass


def rules_from_json(content: dict[str, Any]) -> FrameRules:
    """Return the rules that `rules_to_json` has written."""
    kinds = {kind.__name__: kind for kind in (PerFrameRules, WholeVideoRules)}
    return kinds[content["kind"]](**{key: value for key, value in content.items() if key != "kind"})


def _per_frame_bounds(options: PixelOptions) -> tuple[int, int, int]:
    """Return total_pixels, min_pixels and max_pixels, with the defaults of `PerFrameRules`."""
    return (
        3584 * PIXELS_PER_TOKEN if options.total_pixels is None else options.total_pixels,
        16 * PIXELS_PER_TOKEN if options.min_pixels is None else options.min_pixels,
        MAX_FRAME_PIXELS if options.max_pixels is None else options.max_pixels,
    )
