from __future__ import annotations

import numpy as np
import pytest
import torch
from vcr1_kernels import frames_to_patches, reference

OPTIONS = {
    "patch_size": 4,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "mean": (0.481, 0.458, 0.408),
    "std": (0.269, 0.261, 0.276),
}


def _frames(*shape: int) -> torch.Tensor:
    return torch.randint(256, (*shape, 3), dtype=torch.uint8)


@pytest.mark.parametrize("shape", [(2, 8, 8), (5, 16, 24), (1, 24, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matches_reference(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> None:
    frames = _frames(*shape)
    actual = frames_to_patches(frames.to(device), **OPTIONS, dtype=dtype)
    expected = reference.frames_to_patches(frames, **OPTIONS, dtype=torch.float64)
    assert actual.dtype == dtype and actual.is_contiguous()
    # Rounding error of half a unit in the last place. Triton's interpreter truncates to bfloat16 instead of rounding.
    rounding = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=rounding, atol=1e-6)


def test_patches_of_16_pixels_match_the_reference(device: torch.device) -> None:
    frames = _frames(3, 32, 64)
    options = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    actual = frames_to_patches(frames.to(device), **options)
    torch.testing.assert_close(actual.cpu(), reference.frames_to_patches(frames, **options), rtol=1e-6, atol=1e-6)


def test_unit_order_reorders_merge_units(device: torch.device) -> None:
    frames = _frames(4, 16, 24).to(device)
    unit_order = torch.randperm(2 * 2 * 3)
    actual = frames_to_patches(frames, **OPTIONS, unit_order=unit_order.to(device))
    units = frames_to_patches(frames, **OPTIONS).unflatten(0, (-1, 4))
    assert actual.equal(units[unit_order.to(device)].flatten(0, 1))


def test_odd_patch_sizes(device: torch.device) -> None:
    options = {**OPTIONS, "patch_size": 3, "temporal_patch_size": 3, "merge_size": 1}
    frames = _frames(4, 6, 9)
    expected = reference.frames_to_patches(frames, **options)
    torch.testing.assert_close(frames_to_patches(frames.to(device), **options).cpu(), expected, rtol=1e-6, atol=1e-6)


def test_matches_the_hugging_face_processor(device: torch.device) -> None:
    processors = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    processor = processors.Qwen2VLImageProcessorPil(patch_size=14)
    image = _frames(1, 56, 84)
    expected = processor(images=[np.asarray(image[0])], do_resize=False, return_tensors="pt")["pixel_values"]
    actual = frames_to_patches(
        image.to(device),
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        mean=processor.image_mean,
        std=processor.image_std,
    )
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_empty_video(device: torch.device) -> None:
    assert frames_to_patches(_frames(0, 8, 8).to(device), **OPTIONS).shape == (0, 96)


def test_invalid_input_raises() -> None:
    with pytest.raises(ValueError, match="frames must be uint8"):
        frames_to_patches(torch.zeros(2, 8, 8, 3), **OPTIONS)
    with pytest.raises(ValueError, match=r"frames must be \[num_frames, height, width, 3\]"):
        frames_to_patches(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), **OPTIONS)
    with pytest.raises(ValueError, match=r"12 x 8 pixels are not multiples of patch_size \* merge_size \(8\)"):
        frames_to_patches(_frames(2, 12, 8), **OPTIONS)
    with pytest.raises(ValueError, match=r"unit_order must be \[1\], got \[4\]"):
        frames_to_patches(_frames(2, 8, 8), **OPTIONS, unit_order=torch.arange(4))
