from __future__ import annotations

import base64
import dataclasses
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vcr1.rollout.sglang import payload
from megatron_vcr1.rollout.sglang.patches import to_patches
from megatron_vcr1.rollout.sglang.payload import BY_FILE, BY_VALUE, PatchSettings, Payload, Picture
from tests.model import tiny

SETTINGS = PatchSettings(14, 2, 2, tiny.MEAN, tiny.STD)


def frames(num_frames: int, height: int = 56, width: int = 84, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_frames, height, width, 3), dtype=torch.uint8, generator=generator)


def example() -> Payload:
    pictures = (Picture(frames(1), False, 2), Picture(frames(5), True, 10))
    return Payload(pictures, torch.arange(90).reshape(3, 30), SETTINGS, "3@run")


@pytest.mark.parametrize("transport, start", [("inline", BY_VALUE), ("file", BY_FILE)])
def test_what_is_packed_comes_out(transport: str, start: str) -> None:
    packed = payload.pack(example(), transport)
    assert packed.startswith(start) and payload.is_payload(packed)
    found = payload.unpack(packed)
    assert (found.patches, found.salt) == (SETTINGS, "3@run")
    assert torch.equal(found.positions, example().positions)
    for one, other in zip(found.pictures, example().pictures, strict=True):
        assert torch.equal(one.frames, other.frames)
        assert (one.is_video, one.first_token) == (other.is_video, other.first_token)
        assert found.identity(one) == example().identity(other)
    payload.remove_file(packed)
    if transport == "file":
        assert not Path(packed.removeprefix(BY_FILE)).exists()


def test_the_identity_covers_everything_that_features_depend_on() -> None:
    video = Picture(frames(4), True, 10)
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
    identities = {base.identity(video), *(one.identity(picture) for one, picture in others)}
    assert len(identities) == 1 + len(others)
    after = base.positions.clone()
    after[:, 28:] += 1  # positions behind the picture
    assert dataclasses.replace(base, positions=after).identity(video) == base.identity(video)


@pytest.mark.parametrize(
    "packed",
    [
        BY_VALUE + "!",
        BY_VALUE + base64.b64encode(b"nonsense, and enough of it").decode(),
        BY_FILE + "/etc/hostname",
        BY_FILE + str(payload.payload_dir() / "missing.safetensors"),
    ],
)
def test_what_cannot_be_read_is_a_value_error(packed: str) -> None:
    with pytest.raises(ValueError, match="the pictures cannot be read"):
        payload.unpack(packed)


def test_files_outside_the_folder_are_not_opened(tmp_path: Path) -> None:
    inside = payload.pack_by_file(example())
    outside = tmp_path / "x.safetensors"
    outside.write_bytes(Path(inside.removeprefix(BY_FILE)).read_bytes())
    link = payload.payload_dir() / "0-link.safetensors"
    link.symlink_to(outside)
    try:
        for path in (outside, link):
            with pytest.raises(ValueError, match="is not in"):
                payload.unpack(f"{BY_FILE}{path}")
    finally:
        link.unlink()
        payload.remove_file(inside)


def test_a_file_that_cannot_be_written_whole_is_not_left() -> None:
    before = set(payload.payload_dir().iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # as if no more were free
    try:
        with pytest.raises(OSError, match="File too large"):
            payload.pack_by_file(example())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert set(payload.payload_dir().iterdir()) == before


def test_files_of_ended_processes_are_removed() -> None:
    mine = Path(payload.pack_by_file(example()).removeprefix(BY_FILE))
    orphan = mine.with_name("4194305-0.safetensors")  # above the largest process id
    orphan.write_bytes(b"")
    payload.remove_orphans()
    assert mine.exists() and not orphan.exists()
    mine.unlink()


@pytest.mark.parametrize("num_frames", [1, 4, 6])
def test_patches_are_those_of_the_published_processors(num_frames: int) -> None:
    item = tiny.vision_input(torch.Generator().manual_seed(0), num_frames, 4, 6, 1.0)
    patches, grid = to_patches(item.frames, SETTINGS)
    assert grid == item.grid_thw
    torch.testing.assert_close(patches, tiny._pixel_values(item))
