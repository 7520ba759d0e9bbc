"""Frame sizes match transformers and the published numbers; resized frames match Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as transformers_smart_resize

from megatron_vcr1.data.resize import max_pixels_per_frame, resize_frame, smart_resize


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    factor=st.sampled_from([4, 28, 32]),
    min_tokens=st.integers(1, 64),
    extra_tokens=st.integers(0, 20000),
)
def test_smart_resize_equals_transformers(
    height: int, width: int, factor: int, min_tokens: int, extra_tokens: int
) -> None:
    bounds = {"min_pixels": min_tokens * factor**2, "max_pixels": (min_tokens + extra_tokens) * factor**2}
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ValueError, match="aspect ratio"):
            smart_resize(height, width, factor=factor, **bounds)
        return
    size = smart_resize(height, width, factor=factor, **bounds)
    assert size == transformers_smart_resize(height, width, factor, **bounds)
    assert size[0] % factor == size[1] % factor == 0


def test_smart_resize_keeps_a_fitting_size_and_refuses_impossible_bounds() -> None:
    assert smart_resize(420, 784, factor=28, min_pixels=784, max_pixels=420 * 784) == (420, 784)
    with pytest.raises(ValueError, match=r"min_pixels <= max_pixels, got 100\.\.99"):
        smart_resize(10, 10, factor=28, min_pixels=100, max_pixels=99)


@pytest.mark.parametrize(
    ("num_frames", "expected"),
    [
        (4, 768 * 784),  # a short video: limited by MAX_FRAME_PIXELS
        (20, 358 * 784 + 313),  # 3584 / 20 * 2 = 358.4 tokens
        (448, 16 * 784 + 627),  # 3584 / 448 * 2 = 16 tokens, below 1.05 * 16
        (768, 16 * 784 + 627),
    ],
)
def test_max_pixels_of_a_frame_within_the_pixel_budget(num_frames: int, expected: int) -> None:
    assert max_pixels_per_frame(num_frames, total_pixels=3584 * 784, min_pixels=16 * 784) == expected


@pytest.mark.parametrize("size", [(56, 84), (112, 140), (308, 252)])
def test_resize_frame_equals_pillows_antialiased_bicubic(size: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (197, 231, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC))
    resized = resize_frame(torch.from_numpy(picture), *size)
    assert resized.shape == (*size, 3)
    assert resized.dtype == torch.uint8
    assert np.abs(resized.numpy().astype(int) - expected).max() <= 1


def test_resize_frame_returns_a_frame_of_the_right_size_itself() -> None:
    frame = torch.zeros(56, 84, 3, dtype=torch.uint8)
    assert resize_frame(frame, 56, 84) is frame
