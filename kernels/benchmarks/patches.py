"""Benchmark of frames_to_patches: memory-bound, one byte is read and one number written per value."""

from __future__ import annotations

import torch
from benchmarks.case import Case
from torch import Tensor
from vcr1_kernels import frames_to_patches

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PATCH, TEMPORAL, MERGE = 14, 2, 2


def cases(device: torch.device) -> list[Case]:
    """Return one case, after checking that both implementations agree."""
    on_gpu = device.type == "cuda"
    num_frames, height, width = (768, 448, 448) if on_gpu else (32, 252, 336)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    frames = torch.randint(256, (num_frames, height, width, 3), dtype=torch.uint8, device=device)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))

    def ours() -> Tensor:
        return frames_to_patches(
            frames,
            patch_size=PATCH,
            temporal_patch_size=TEMPORAL,
            merge_size=MERGE,
            mean=MEAN,
            std=STD,
            dtype=dtype,
        )

    def processor_style() -> Tensor:
        images = (frames.permute(0, 3, 1, 2).float() / 255 - mean) / std
        units = (height // PATCH // MERGE, MERGE, PATCH, width // PATCH // MERGE, MERGE, PATCH)
        split = images.reshape(num_frames // TEMPORAL, TEMPORAL, 3, *units)
        return split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(0, 4).flatten(1).to(dtype)

    torch.testing.assert_close(ours(), processor_style(), rtol=1e-2, atol=1e-5)
    providers = {"vcr1_kernels": ours, "torch, like the processors": processor_style}
    if on_gpu:
        providers["torch.compile"] = torch.compile(processor_style)
    min_bytes = frames.numel() * (1 + dtype.itemsize)
    return [Case("frames_to_patches", f"{num_frames} frames {height}x{width} {dtype}", providers, min_bytes=min_bytes)]
