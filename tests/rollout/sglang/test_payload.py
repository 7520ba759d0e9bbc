"""Tests of payloads: packing, identities, files and their removal."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
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


def resaved(**changes: object) -> str:
    """Pack the example with other values in its description; a value that is a function changes the old one."""
    data = base64.b64decode(payload.pack_inline(example()).removeprefix(INLINE_PREFIX))
    length = int.from_bytes(data[:8], "little")
    description = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["description"])
    for key, value in changes.items():
        description[key] = value(description[key]) if callable(value) else value
    return with_description(json.dumps(description))


def with_description(description: str) -> str:
    data = base64.b64decode(payload.pack_inline(example()).removeprefix(INLINE_PREFIX))
    packed = safetensors.torch.save(safetensors.torch.load(data), {"format": "1", "description": description})
    return INLINE_PREFIX + base64.b64encode(packed).decode()


def with_tensors(**tensors: Tensor) -> str:
    data = base64.b64decode(payload.pack_inline(example()).removeprefix(INLINE_PREFIX))
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    packed = safetensors.torch.save(safetensors.torch.load(data) | tensors, metadata)
    return INLINE_PREFIX + base64.b64encode(packed).decode()


def patches(**values: object) -> Callable[[dict[str, object]], dict[str, object]]:
    return lambda old: old | values


@pytest.mark.parametrize(
    "packed, reason",
    [
        (with_description("[" * 100_000), "nested too deeply"),
        (with_description("[]"), "expected a JSON object, got a list"),
        (with_description('{"media": ' + "1" * 5000 + "}"), "not JSON that can be read"),
        (INLINE_PREFIX + base64.b64encode((10**5).to_bytes(8, "little") + b"[" * 10**5).decode(), "nested too deeply"),
        (INLINE_PREFIX + base64.b64encode(b"\2\0\0\0\0\0\0\0{}").decode(), "__metadata__"),
        (resaved(media=[{"is_video": True, "first_token": float("inf")}]), "first_token|does not fit"),
        (resaved(media=[{"is_video": True, "first_token": 29}]), "does not fit into the prompt at token 29"),
        (resaved(media=[{"is_video": True, "first_token": -1}]), "does not fit"),
        (resaved(media=None), "not iterable"),
        (resaved(patches=patches(patch_size=0)), "patch_size is 0"),
        (resaved(patches=patches(temporal_patch_size=10**9)), "temporal_patch_size is 1000000000"),
        (resaved(patches=patches(merge_size="2")), "merge_size is '2'"),
        (resaved(patches=patches(pixel_std=[1, 1, 0])), "pixel_std must be positive"),
        (resaved(patches=patches(pixel_mean=[1, float("nan"), 0])), "pixel_mean must be three numbers"),
        (resaved(patches=patches(unknown=1)), "unknown"),
        (with_tensors(frames_0=torch.zeros(1, 28, 28, 3)), "frames must be uint8"),
        (with_tensors(frames_0=torch.zeros(28, 28, 3, dtype=torch.uint8)), "frames must be uint8"),
        (with_tensors(frames_0=torch.zeros(1, 28, 27, 3, dtype=torch.uint8)), "multiples of 28"),
        (with_tensors(positions=torch.zeros(3, 0, dtype=torch.int32)), "positions have the shape"),
    ],
    ids=range(19),
)
def test_a_hostile_payload_is_a_value_error(packed: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"the images and videos of a prompt cannot be read: .*({reason})"):
        payload.unpack(packed)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use a folder that does not exist yet, in place of the one in /dev/shm."""
    folder = tmp_path / "vcr1"
    monkeypatch.setattr(payload, "payload_dir", lambda: folder)
    return folder


def test_only_payload_files_of_the_folder_are_read(folder: Path, tmp_path: Path) -> None:
    inside = Path(payload.pack_to_file(example()).removeprefix(FILE_PREFIX))
    outside = tmp_path / inside.name
    outside.write_bytes(inside.read_bytes())
    (folder / "secret.safetensors").write_bytes(inside.read_bytes())
    link, fifo, directory = (folder / f"{number:032x}.safetensors" for number in range(3))
    link.symlink_to(outside)
    os.mkfifo(fifo)
    directory.mkdir()
    traversal = f"{folder}/../{outside.name}"
    for path in (
        outside,
        traversal,
        f"{folder}/x/../{inside.name}",
        folder / "secret.safetensors",
        link,
        fifo,
        directory,
    ):
        with pytest.raises(ValueError, match="the images and videos of a prompt cannot be read"):
            payload.unpack(f"{FILE_PREFIX}{path}")
    assert payload.unpack(f"{FILE_PREFIX}{inside}").salt == "3@run"
    payload.remove_file(f"{FILE_PREFIX}{inside}")
    assert not inside.exists()


def test_a_folder_that_another_user_has_planted_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    model = victim / f"{0:032x}.safetensors"
    model.write_bytes(b"weights")
    folder.symlink_to(victim)
    for action in (payload.remove_orphans, lambda: payload.pack_to_file(example())):
        with pytest.raises(PermissionError, match="is not a directory of this user"):
            action()
    assert [path.name for path in victim.iterdir()] == [model.name]
    folder.unlink()
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(PermissionError, match="is open to other users; run: chmod 700"):
        payload.remove_orphans()
    folder.chmod(0o700)
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    with pytest.raises(PermissionError, match="belongs to another user"):
        payload.remove_orphans()


def test_an_incomplete_file_is_removed(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # as if the disk were full
    try:
        with pytest.raises(OSError, match="File too large"):
            payload.pack_to_file(example())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(folder.iterdir())


OWNER = """
import os, sys
from pathlib import Path
from megatron_vcr1.rollout.sglang import payload
from tests.rollout.sglang.test_payload import example
payload.payload_dir = lambda: Path(sys.argv[1])
print(payload.pack_to_file(example()), flush=True)
sys.stdin.read()
"""


def test_only_files_of_ended_processes_are_removed(folder: Path) -> None:
    """The lock of a file tells whether its owner is alive, not a process id: containers have their own."""
    mine = Path(payload.pack_to_file(example()).removeprefix(FILE_PREFIX))
    (folder / "model.safetensors").write_bytes(b"not ours")
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    theirs = Path(owner.stdout.readline().strip().removeprefix(FILE_PREFIX))
    payload.remove_orphans()
    assert {path.name for path in folder.iterdir()} == {mine.name, theirs.name, "model.safetensors"}
    assert payload.unpack(f"{FILE_PREFIX}{theirs}").salt == "3@run"
    owner.kill()
    owner.communicate()
    payload.remove_orphans()
    assert {path.name for path in folder.iterdir()} == {mine.name, "model.safetensors"}
    payload.remove_file(f"{FILE_PREFIX}{mine}")
    payload.remove_file(f"{FILE_PREFIX}{mine}")  # nothing is left to do
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
