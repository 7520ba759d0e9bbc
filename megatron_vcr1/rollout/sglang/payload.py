"""How a prompt's pictures travel to a server: final frames, positions and the cache's salt in one string.

    data:application/x-vcr1;base64,<safetensors>   by value
    vcr1-file:<path>                               by a file in this host's shared memory

Both are taken in SGLang's `video_data`. Frames stay uint8 until the server has them (a quarter of normalised pixels),
and nothing is sampled, resized or positioned again there. This module runs in the trainer and in the server; it needs
torch and safetensors alone.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

BY_VALUE = "data:application/x-vcr1;base64,"
BY_FILE = "vcr1-file:"
_FORMAT = "1"


@dataclass(frozen=True, slots=True)
class PatchSettings:
    """How frames become the vision tower's patches."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Picture:
    """One image or video of a prompt."""

    frames: Tensor
    """uint8 [num_frames, height, width, 3], of their final size."""
    is_video: bool
    first_token: int
    """Row of the prompt where its pad tokens begin."""


@dataclass(frozen=True, slots=True)
class Payload:
    """A prompt's pictures and positions."""

    pictures: tuple[Picture, ...]
    positions: Tensor
    """int64 [3, prompt_tokens]: mRoPE positions of the whole prompt."""
    patches: PatchSettings
    salt: str
    """Names the weights. Servers cache vision features across weight updates, by the pictures' identities alone."""

    def num_tokens(self, picture: Picture) -> int:
        """Pad tokens that a picture fills."""
        num_frames, height, width, _ = picture.frames.shape
        side = self.patches.patch_size * self.patches.merge_size
        return -(-num_frames // self.patches.temporal_patch_size) * (height // side) * (width // side)

    def identity(self, picture: Picture) -> bytes:
        """SHA-256 over all that the picture's features and its place in the cache depend on: frames, how they are cut
        and normalised, positions (time, that is) and the weights.
        """
        rows = slice(picture.first_token, picture.first_token + self.num_tokens(picture))
        settings = [list(picture.frames.shape), picture.is_video, asdict(self.patches), self.salt]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        digest.update(_bytes_of(picture.frames))
        digest.update(_bytes_of(self.positions[:, rows]))
        return digest.digest()


def payload_dir() -> Path:
    """Where files of payloads lie; a server opens no others. Only this user can write there."""
    folder = Path("/dev/shm") / f"vcr1-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user; let its owner remove it")
    return folder


def pack(payload: Payload, transport: str) -> str:
    """By value ("inline") or by file ("file")."""
    return pack_by_file(payload) if transport == "file" else pack_by_value(payload)


def pack_by_value(payload: Payload) -> str:
    return BY_VALUE + base64.b64encode(_serialize(payload)).decode()


def pack_by_file(payload: Payload) -> str:
    """The caller removes the file (`remove_file`) when the answer is there. Raises OSError, and leaves no file."""
    path = payload_dir() / f"{os.getpid()}-{uuid.uuid4().hex}.safetensors"
    try:
        path.write_bytes(_serialize(payload))
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return f"{BY_FILE}{path}"


def remove_file(packed: str) -> None:
    """Remove what `pack_by_file` wrote; does nothing for a payload by value."""
    if packed.startswith(BY_FILE):
        Path(packed.removeprefix(BY_FILE)).unlink(missing_ok=True)


def remove_orphans() -> None:
    """Remove the files of processes that ended without doing it."""
    for path in payload_dir().glob("*.safetensors"):
        pid = path.name.partition("-")[0]
        if not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)


def is_payload(item: object) -> bool:
    return isinstance(item, str) and item.startswith((BY_VALUE, BY_FILE))


def unpack(packed: str) -> Payload:
    """The inverse of the two packers.

    Raises:
        ValueError: damaged, of another version, or a file outside `payload_dir`. (SGLang answers 400 to a ValueError.)
    """
    try:
        data = _content(packed)
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        tensors = load(data)
        if metadata["format"] != _FORMAT:
            raise ValueError(f"its format is {metadata['format']}, this plug-in reads {_FORMAT}")
        description = json.loads(metadata["description"])
        pictures = tuple(
            Picture(tensors[f"frames_{index}"], bool(one["is_video"]), int(one["first_token"]))
            for index, one in enumerate(description["pictures"])
        )
        patches = description["patches"]
        patches |= {key: tuple(patches[key]) for key in ("pixel_mean", "pixel_std")}
        return Payload(pictures, tensors["positions"].long(), PatchSettings(**patches), str(description["salt"]))
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise ValueError(f"the pictures cannot be read: {error!r}; trainer and server must run one version") from error


def _serialize(payload: Payload) -> bytes:
    pictures = [{"is_video": one.is_video, "first_token": one.first_token} for one in payload.pictures]
    description = {"pictures": pictures, "patches": asdict(payload.patches), "salt": payload.salt}
    tensors = {f"frames_{index}": one.frames.contiguous() for index, one in enumerate(payload.pictures)}
    tensors["positions"] = payload.positions.to(torch.int32).contiguous()
    return save(tensors, {"format": _FORMAT, "description": json.dumps(description)})


def _content(packed: str) -> bytes:
    if packed.startswith(BY_VALUE):
        try:
            return base64.b64decode(packed.removeprefix(BY_VALUE), validate=True)
        except binascii.Error as error:
            raise ValueError(str(error)) from error
    path = Path(packed.removeprefix(BY_FILE))
    if path.parent != payload_dir() or path.is_symlink():
        raise ValueError(f"{path} is not in {payload_dir()}")
    return path.read_bytes()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().numpy().data.cast("B")
