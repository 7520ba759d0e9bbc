"""The image settings of a model directory: patch sizes, pixel bounds and normalization.

transformers 5 saves processor_config.json with a section for images and one for videos. Earlier versions saved
preprocessor_config.json, which images and videos share, or a video_preprocessor_config.json besides it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_vcr1.json_fields import Fields

COMBINED_FILE = "processor_config.json"
IMAGE_FILE = "preprocessor_config.json"
VIDEO_FILE = "video_preprocessor_config.json"
_PATCH_DEFAULTS = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
_MAX_PATCH_SIZES = {"patch_size": 1024, "temporal_patch_size": 64, "merge_size": 64}
_MAX_PIXELS = 2**40


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """How a model's processor prepares images and videos."""

    where: str  # the file, and the section in it, that the settings come from
    patch_size: int  # pixels
    temporal_patch_size: int  # frames
    merge_size: int  # merge_size x merge_size patches become one token
    min_pixels: int | None  # bounds of an image's area after resizing; None: not set
    max_pixels: int | None
    # The same for all frames of a video together, from the section or file for videos, and the bound on one frame.
    min_video_pixels: int | None
    max_video_pixels: int | None
    max_frame_pixels: int | None
    # Mean and standard deviation of pixels in [0, 1], by channel; None: not set.
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def read_image_settings(model_dir: Path, *, video_patch_size: int) -> ImageSettings | None:
    """Read the image settings of a model directory; None if it has none.

    Args:
        model_dir: the directory.
        video_patch_size: patch size of videos if their settings have none.

    Raises:
        UserError: a file is damaged, a value has the wrong type or is out of range, videos have other settings than
            images, or a step is configured that this project does not do; names the file, the key and the value.
    """
    combined = _read(model_dir / COMBINED_FILE)
    image = combined.section("image_processor") if combined and "image_processor" in combined else None
    video = combined.section("video_processor") if combined and "video_processor" in combined else None
    image = image or _read(model_dir / IMAGE_FILE)
    video = video or _read(model_dir / VIDEO_FILE) or image
    if image is None or video is None:
        return None
    _check_steps(image)
    _check_steps(video)
    settings = _settings(image, _PATCH_DEFAULTS)
    defaults = _PATCH_DEFAULTS | {"patch_size": video_patch_size}
    of_videos = _settings(video, defaults)
    _check_same(settings, of_videos, video, defaults)
    max_frame_pixels = None
    if video.boolean("cap_pixels_per_frame", False):
        max_frame_tokens = video.integer("max_video_tokens", 768, maximum=_MAX_PIXELS)
        max_frame_pixels = max_frame_tokens * (settings.patch_size * settings.merge_size) ** 2
    return replace(
        settings,
        min_video_pixels=of_videos.min_pixels,
        max_video_pixels=of_videos.max_pixels,
        max_frame_pixels=max_frame_pixels,
    )


def _read(path: Path) -> Fields | None:
    # `exists`, not `is_file`: a directory or a FIFO of this name is an error, and not a missing file.
    return Fields.from_file(path) if path.exists() else None


def _settings(fields: Fields, defaults: Mapping[str, int]) -> ImageSettings:
    sizes = {key: fields.integer(key, default, maximum=_MAX_PATCH_SIZES[key]) for key, default in defaults.items()}
    min_pixels, max_pixels = _pixel_bounds(fields)
    return ImageSettings(
        fields.where,
        **sizes,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        min_video_pixels=None,
        max_video_pixels=None,
        max_frame_pixels=None,
        mean=fields.numbers("image_mean", length=3) if "image_mean" in fields else None,
        std=fields.numbers("image_std", length=3, above=0) if "image_std" in fields else None,
    )


def _pixel_bounds(fields: Fields) -> tuple[int | None, int | None]:
    """Return min_pixels and max_pixels, under any of the names that transformers has given them."""
    size = fields.section("size")
    bounds: list[int | None] = []
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        named = ((fields, key), (size, edge), (size, key))
        found = (source.integer(name, maximum=_MAX_PIXELS) for source, name in named if name in source)
        bounds.append(next(found, None))
    low, high = bounds
    if low is not None and high is not None and low > high:
        raise fields.error("size" if "size" in fields else "min_pixels", f"allows no image: {low} > {high} pixels")
    return low, high


def _check_steps(fields: Fields) -> None:
    """Refuse settings that switch off or change a step which is always done."""
    for key in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        if not fields.boolean(key, True):
            raise fields.error(key, "must be true: every image and frame is resized, scaled to [0, 1] and normalized")
    factor = fields.number("rescale_factor", 1 / 255)
    if not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise fields.error("rescale_factor", "must be 1/255: pixels are scaled to [0, 1]")


def _check_same(image: ImageSettings, video: ImageSettings, fields: Fields, defaults: Mapping[str, int]) -> None:
    """Refuse a video section that differs from the images' settings: the model treats both alike."""
    keys = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size", "merge_size": "merge_size"}
    keys |= {"image_mean": "mean", "image_std": "std"}
    for key, attribute in keys.items():
        expected, found = getattr(image, attribute), getattr(video, attribute)
        if key in fields and expected is not None and found != expected:
            raise fields.error(key, f"must be {_shown(expected)}, as for images ({image.where})")
        if key in defaults and found != expected:
            raise fields.error(key, f"defaults to {found}, but must be {_shown(expected)}, as in {image.where}")


def _shown(value: int | tuple[float, ...]) -> str:
    return str(list(value) if isinstance(value, tuple) else value)
