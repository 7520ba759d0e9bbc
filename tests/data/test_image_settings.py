"""Image settings of a model directory: every wrong value is an error that names file, key and value."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.data.image_settings import read_image_settings
from megatron_vcr1.errors import UserError

MEAN, STD = [0.5, 0.4, 0.3], [0.1, 0.2, 0.3]


def test_settings_are_read(tmp_path: Path) -> None:
    assert read_image_settings(tmp_path, video_patch_size=14) is None
    content = {
        "patch_size": 16,
        "image_mean": MEAN,
        "image_std": STD,
        "size": {"shortest_edge": 10, "longest_edge": 90},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    settings = read_image_settings(tmp_path, video_patch_size=14)
    assert settings is not None
    assert (settings.patch_size, settings.temporal_patch_size, settings.merge_size) == (16, 2, 2)
    assert (settings.min_pixels, settings.max_pixels) == (10, 90)
    assert (settings.mean, settings.std) == (tuple(MEAN), tuple(STD))


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "expected a JSON object, got a list"),
        ("text", "expected a JSON object, got a text"),
        ({"image_mean": 0.5}, "image_mean is 0.5; it must be a list of 3 numbers"),
        ({"image_mean": [0.5]}, "image_mean is [0.5]; it must be a list of 3 numbers"),
        ({"image_mean": [0.5, 0.5, "x"]}, "it must be a list of 3 numbers"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "it must be a list of 3 numbers"),
        ({"image_std": [1, 1, 0]}, "image_std is [1, 1, 0]; it must be a list of 3 numbers, each above 0"),
        ({"image_std": [1, 1, 10**400]}, "image_std is [1, 1, "),
        ({"patch_size": "14"}, "patch_size is '14'; it must be an integer from 1 to 1024"),
        ({"patch_size": 0}, "patch_size is 0; it must be an integer"),
        ({"patch_size": 10**9}, "patch_size is 1000000000; it must be an integer"),
        ({"merge_size": -2}, "merge_size is -2; it must be an integer"),
        ({"temporal_patch_size": 2.0}, "temporal_patch_size is 2.0; it must be an integer"),
        ({"min_pixels": "3136"}, "min_pixels is '3136'; it must be an integer"),
        ({"max_pixels": 0}, "max_pixels is 0; it must be an integer"),
        ({"min_pixels": 100, "max_pixels": 99}, "allows no image: 100 > 99 pixels"),
        ({"size": 224}, "size: expected a JSON object, got a number"),
        ({"size": {"shortest_edge": [1]}}, "size: shortest_edge is [1]; it must be an integer"),
        ({"do_normalize": False}, "do_normalize is False; it must be true"),
        ({"do_rescale": "yes"}, "do_rescale is 'yes'; it must be true or false"),
        ({"rescale_factor": 1}, "rescale_factor is 1; it must be 1/255"),
    ],
)
@pytest.mark.parametrize("section", [None, "image_processor"])
def test_a_wrong_value_is_named(tmp_path: Path, content: Any, message: str, section: str | None) -> None:
    file = tmp_path / ("processor_config.json" if section else "preprocessor_config.json")
    file.write_text(json.dumps({section: content} if section else content))
    with pytest.raises(UserError) as error:
        read_image_settings(tmp_path, video_patch_size=14)
    assert str(error.value).startswith(f"{file}: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "name", ["processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"]
)
@pytest.mark.parametrize("content", ["[]", "7", "{", "[" * 100_000, "fifo"])
def test_a_file_that_holds_no_object_is_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    if content == "fifo":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"/{name}: "):
        read_image_settings(tmp_path, video_patch_size=14)


@pytest.mark.parametrize(
    "video, message",
    [
        ({"patch_size": 16}, "patch_size is 16; it must be 14, as for images"),
        ({"image_mean": [0, 0, 0], "image_std": STD}, "image_mean is [0, 0, 0]; it must be [0.5, 0.4, 0.3]"),
        ({"merge_size": "2"}, "merge_size is '2'; it must be an integer"),
    ],
)
def test_videos_must_have_the_settings_of_images(tmp_path: Path, video: dict[str, Any], message: str) -> None:
    image = {"image_mean": MEAN, "image_std": STD}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": image, "video_processor": video}))
    with pytest.raises(UserError) as error:
        read_image_settings(tmp_path, video_patch_size=14)
    assert f"{tmp_path / 'processor_config.json'}: video_processor: {message}" in str(error.value)


def test_the_bounds_of_videos_are_those_of_their_own_section_or_file(tmp_path: Path) -> None:
    image = {"patch_size": 16, "size": {"shortest_edge": 10, "longest_edge": 90}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image))
    shared = read_image_settings(tmp_path, video_patch_size=16)
    assert shared is not None  # without a file of their own, videos share the one of images
    assert (shared.min_video_pixels, shared.max_video_pixels, shared.max_frame_pixels) == (10, 90, None)
    video = {"size": {"shortest_edge": 20, "longest_edge": 800}, "cap_pixels_per_frame": True, "max_video_tokens": 5}
    (tmp_path / "video_preprocessor_config.json").write_text(json.dumps(video))
    own = read_image_settings(tmp_path, video_patch_size=16)
    assert own is not None
    assert (own.min_pixels, own.max_pixels) == (10, 90)
    assert (own.min_video_pixels, own.max_video_pixels, own.max_frame_pixels) == (20, 800, 5 * 32 * 32)
    with pytest.raises(
        UserError, match=r"patch_size is None; it defaults to 14, but must be 16, as in .*/preprocessor_config"
    ):
        read_image_settings(tmp_path, video_patch_size=14)
