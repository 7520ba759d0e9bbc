"""Tests of payloads: packing, identities, files and their removal."""

from __future__ import annotations

import base64
import dataclasses
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vcr1.rollout.sglang import payload
from megatron_vcr1.rollout.sglang.payload import FILE_PREFIX, INLINE_PREFIX, MediaItem, PatchSettings, Payload
from tests.model import tiny

SETTINGS = PatchSettings(14, 2, 2, tiny.MEAN, tiny.STD)


def frames(num_frames: int, height: int = 56, width: int = 84, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_frames, height, width, 3), dtype=torch.uint8, generator=generator)


def example() -> Payload:
    media = (MediaItem(frames(1), False, 2), MediaItem(frames(5), True, 10))
    return Payload(media, torch.arange(90).reshape(3, 30), SETTINGS, "3@run")


@pytest.mark.parametrize("transport, start", [("inline", INLINE_PREFIX), ("file", FILE_PREFIX)])
def test_unpack_inverts_pack(transport: str, start: str) -> None:
    packed = payload.pack(example(), transport)
    assert packed.startswith(start) and payload.is_payload(packed)
    found = payload.unpack(packed)
    assert (found.patches, found.salt) == (SETTINGS, "3@run")
    assert torch.equal(found.positions, example().positions)
    for item, other in zip(found.media, example().media, strict=True):
        assert torch.equal(item.frames, other.frames)
        assert (item.is_video, item.first_token) == (other.is_video, other.first_token)
        assert found.identity(item) == example().identity(other)
    payload.remove_file(packed)
    if transport == "file":
        assert not Path(packed.removeprefix(FILE_PREFIX)).exists()


def test_the_identity_changes_with_everything_that_features_depend_on() -> None:
    video = MediaItem(frames(4), True, 10)
    base = Payload((video,), torch.arange(90).reshape(3, 30), SETTINGS, "a")
    later = base.positions.clone()
    later[0, 12] += 1  # the same frames, further apart in time
    others = [
        (dataclasses.replace(base, salt="b"), video),
        (dataclasses.replace(base, positions=later), video),
        (dataclasses.replace(base, patches=dataclasses.replace(SETTINGS, pixel_mean=(0.5, 0.5, 0.5))), video),
        (base, dataclasses.replace(video, frames=frames(4, seed=1))),
        (base, dataclasses.replace(video, frames=frames(4).view(4, 84, 56, 3))),
        (base, dataclasses.replace(video, is_video=False)),
    ]
    identities = {base.identity(video), *(other.identity(item) for other, item in others)}
    assert len(identities) == 1 + len(others)
    after = base.positions.clone()
    after[:, 28:] += 1  # positions after the video
    assert dataclasses.replace(base, positions=after).identity(video) == base.identity(video)


@pytest.mark.parametrize(
    "packed",
    [
        INLINE_PREFIX + "!",
        INLINE_PREFIX + base64.b64encode(b"not a safetensors file at all").decode(),
        FILE_PREFIX + "/etc/hostname",
        FILE_PREFIX + str(payload.payload_dir() / "missing.safetensors"),
    ],
)
def test_a_damaged_payload_is_a_value_error(packed: str) -> None:
    with pytest.raises(ValueError, match="the images and videos of a prompt cannot be read"):
        payload.unpack(packed)


def test_files_outside_of_the_folder_are_not_read(tmp_path: Path) -> None:
    inside = payload.pack_to_file(example())
    outside = tmp_path / "x.safetensors"
    outside.write_bytes(Path(inside.removeprefix(FILE_PREFIX)).read_bytes())
    link = payload.payload_dir() / "0-link.safetensors"
    link.symlink_to(outside)
    try:
        for path in (outside, link):
            with pytest.raises(ValueError, match="is not in"):
                payload.unpack(f"{FILE_PREFIX}{path}")
    finally:
        link.unlink()
        payload.remove_file(inside)


def test_an_incomplete_file_is_removed() -> None:
    before = set(payload.payload_dir().iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # as if the disk were full
    try:
        with pytest.raises(OSError, match="File too large"):
            payload.pack_to_file(example())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert set(payload.payload_dir().iterdir()) == before


def test_files_of_ended_processes_are_removed() -> None:
    mine = Path(payload.pack_to_file(example()).removeprefix(FILE_PREFIX))
    orphan = mine.with_name("4194305-0.safetensors")  # above the largest process id
    orphan.write_bytes(b"")
    payload.remove_orphans()
    assert mine.exists() and not orphan.exists()
    mine.unlink()
