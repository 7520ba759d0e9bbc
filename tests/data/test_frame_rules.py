"""Frame sizes by the rules for each frame and for whole videos; the latter match transformers."""

from __future__ import annotations

import json
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

from megatron_vcr1.data.frame_rules import (
    PER_FRAME_RULES,
    FrameRules,
    PixelOptions,
    WholeVideoRules,
    rules_from_json,
    rules_to_json,
)
from megatron_vcr1.model.families.registry import FAMILIES

RULES = cast(WholeVideoRules, FAMILIES["qwen3_vl"].media.frames)


def test_the_bounds_of_the_published_models() -> None:
    assert WholeVideoRules(min_video_pixels=4096, max_video_pixels=25_165_824) == RULES
    assert FAMILIES["qwen3_vl"].media.video_patch_size == 16


def size(num_frames: int, height: int, width: int, rules: WholeVideoRules = RULES, **options: int) -> tuple[int, int]:
    return rules.frame_size(num_frames, height, width, factor=32, options=PixelOptions(**options))


@given(
    num_frames=st.integers(2, 768),
    height=st.integers(8, 3000),
    width=st.integers(8, 3000),
    min_tokens=st.integers(1, 4000),
    extra_tokens=st.integers(0, 40_000),
)
def test_the_bounds_of_whole_videos_equal_transformers(
    num_frames: int, height: int, width: int, min_tokens: int, extra_tokens: int
) -> None:
    bounds = (1024 * min_tokens, 1024 * (min_tokens + extra_tokens))
    rules = RULES.with_file_bounds(*bounds, None)
    if max(height, width) > 190 * min(height, width):
        return
    expected = smart_resize(num_frames, height, width, factor=32, min_pixels=bounds[0], max_pixels=bounds[1])
    assert size(num_frames, height, width, rules) == expected


def test_an_extreme_aspect_ratio_is_refused() -> None:
    with pytest.raises(ValueError, match="aspect ratio"):
        size(2, 32, 32 * 201)


def test_bounds_that_the_files_leave_out_are_the_familys() -> None:
    assert RULES.with_file_bounds(None, None, None) == RULES
    assert RULES.with_file_bounds(2048, None, None).max_video_pixels == RULES.max_video_pixels
    assert PER_FRAME_RULES.with_file_bounds(2048, 4096, 1024) is PER_FRAME_RULES


def test_the_pixel_options_have_the_same_meaning_by_both_rules() -> None:
    for num_frames in (4, 20, 200):
        height, width = size(num_frames, 1080, 1920, total_pixels=3000 * 1024)
        assert 2700 * 1024 < num_frames / 2 * height * width <= 3000 * 1024
    height, width = size(20, 1080, 1920, max_pixels=100 * 1024)
    assert 80 * 1024 < height * width <= 100 * 1024
    height, width = size(20, 60, 90, min_pixels=100 * 1024)
    assert 100 * 1024 <= height * width < 140 * 1024
    height, width = size(200, 1080, 1920, total_pixels=1024, min_pixels=16 * 1024)  # the minimum of a frame is kept
    assert 12 * 1024 <= height * width <= 16.8 * 1024


def test_a_cap_in_the_files_bounds_each_frame() -> None:
    capped = RULES.with_file_bounds(None, None, 768 * 1024)
    assert size(4, 2160, 3840) == (1856, 3328)
    height, width = size(4, 2160, 3840, capped)
    assert 700 * 1024 < height * width <= 768 * 1024
    assert size(200, 1080, 1920, capped) == size(200, 1080, 1920)


def test_the_smallest_video_of_the_files_is_no_bound_below_the_options() -> None:
    rules = RULES.with_file_bounds(128 * 1024, None, 768 * 1024)
    height, width = size(16, 1080, 1920, rules, max_pixels=50 * 1024)
    assert 40 * 1024 < height * width <= 50 * 1024
    height, width = size(128, 1080, 1920, rules, total_pixels=2000 * 1024)
    assert 1200 * 1024 < 64 * height * width <= 2000 * 1024
    assert size(768, 1080, 1920, rules, total_pixels=1, max_pixels=1) == (32, 32)


@pytest.mark.parametrize("num_frames", [4, 200])
def test_a_cap_in_the_files_equals_transformers(num_frames: int) -> None:
    rules = RULES.with_file_bounds(128 * 1024, 4000 * 1024, 768 * 1024)
    most = num_frames * max(min(768 * 1024, 4000 * 1024 // num_frames), int(128 * 1024 * 1.05))  # as in its `resize`
    expected = smart_resize(num_frames, 1080, 1920, factor=32, min_pixels=128 * 1024, max_pixels=most)
    assert size(num_frames, 1080, 1920, rules) == expected


@pytest.mark.parametrize("rules", [PER_FRAME_RULES, RULES, RULES.with_file_bounds(1, 2, 3)])
def test_rules_pass_through_json(rules: FrameRules) -> None:
    assert rules_from_json(json.loads(json.dumps(rules_to_json(rules)))) == rules


def test_the_most_pixels_of_a_video() -> None:
    assert RULES.most_pixels(100, PixelOptions()) == RULES.max_video_pixels
    assert RULES.most_pixels(100, PixelOptions(total_pixels=5000)) == 10_000
    assert PER_FRAME_RULES.most_pixels(100, PixelOptions(total_pixels=784 * 500, min_pixels=784)) == 784 * 1000
    assert RULES.with_defaults(PixelOptions()) == PixelOptions(12288 * 1024, None, None)
