"""The payload of a request: the images and videos of a prompt, its positions and a cache salt, packed into one string.

    data:application/x-vcr1;base64,<safetensors>   inline
    vcr1-file:<path>                               in a file in this host's shared memory

SGLang's `video_data` accepts both. Frames stay uint8 on the way (a quarter of the size of normalized pixels), and the
server does not sample, resize or position anything again. This module runs in the trainer and in the server, so it only
needs torch and safetensors.
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

INLINE_PREFIX = "data:application/x-vcr1;base64,"
FILE_PREFIX = "vcr1-file:"
_FORMAT = "1"


@dataclass(frozen=True, slots=True)
class PatchSettings:
    """The settings that convert frames to patches of the vision tower."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class MediaItem:
    """One image or video of a prompt."""

    frames: Tensor
    """uint8 [num_frames, height, width, 3], already resized."""
    is_video: bool
    first_token: int
    """Index of its first pad token in the prompt."""


@dataclass(frozen=True, slots=True)
class Payload:
    """The images, videos and positions of a prompt."""

    media: tuple[MediaItem, ...]
    positions: Tensor
    """int64 [3, prompt_tokens]: mRoPE positions of the whole prompt."""
    patches: PatchSettings
    salt: str
    """Name of the weights. Servers keep vision features in a cache across weight updates, under the items' identities;
    the salt makes sure that features of old weights are not used."""

    def num_tokens(self, item: MediaItem) -> int:
        """Return the number of pad tokens of an image or video."""
        num_frames, height, width, _ = item.frames.shape
        pixels_per_token = self.patches.patch_size * self.patches.merge_size  # in each direction
        num_time_steps = -(-num_frames // self.patches.temporal_patch_size)
        return num_time_steps * (height // pixels_per_token) * (width // pixels_per_token)

    def identity(self, item: MediaItem) -> bytes:
        """Compute the SHA-256 of everything that the item's features, and the KV cache of its tokens, depend on.

        These are the frames, the settings of patches and normalization, the positions (which contain the time between
        frames) and the weights.
        """
        tokens = slice(item.first_token, item.first_token + self.num_tokens(item))
        settings = [list(item.frames.shape), item.is_video, asdict(self.patches), self.salt]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        digest.update(_bytes_of(item.frames))
        digest.update(_bytes_of(self.positions[:, tokens]))
        return digest.digest()


def payload_dir() -> Path:
    """Return the folder of payload files. Only this user can write there, and servers read no other files.

    Raises:
        PermissionError: the folder belongs to another user.
    """
    folder = Path("/dev/shm") / f"vcr1-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user; let its owner remove it")
    return folder


def pack(payload: Payload, transport: str) -> str:
    """Pack a payload inline or into a file, according to `sglang.transport` ("inline" or "file")."""
    return pack_to_file(payload) if transport == "file" else pack_inline(payload)


def pack_inline(payload: Payload) -> str:
    """Pack a payload into the string itself."""
    return INLINE_PREFIX + base64.b64encode(_serialize(payload)).decode()


def pack_to_file(payload: Payload) -> str:
    """Write a payload to a file in shared memory, and return a string with its path.

    The caller removes the file with `remove_file` when the server has responded.

    Raises:
        OSError: the file cannot be written; no incomplete file is left.
    """
    # The name begins with the process id, by which `remove_orphans` finds files of processes that have been killed.
    path = payload_dir() / f"{os.getpid()}-{uuid.uuid4().hex}.safetensors"
    try:
        path.write_bytes(_serialize(payload))
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return f"{FILE_PREFIX}{path}"


def remove_file(packed: str) -> None:
    """Remove the file of a packed payload; does nothing for an inline payload."""
    if packed.startswith(FILE_PREFIX):
        Path(packed.removeprefix(FILE_PREFIX)).unlink(missing_ok=True)


def remove_orphans() -> None:
    """Remove the files of processes that ended without removing them."""
    for path in payload_dir().glob("*.safetensors"):
        pid = path.name.partition("-")[0]
        if not Path(f"/proc/{pid}").exists():
            path.unlink(missing_ok=True)


def is_payload(item: object) -> bool:
    """Return whether an entry of `video_data` is a packed payload."""
    return isinstance(item, str) and item.startswith((INLINE_PREFIX, FILE_PREFIX))


def unpack(packed: str) -> Payload:
    """Read a payload that was packed inline or into a file.

    Raises:
        ValueError: the payload is damaged, has another format, or its file is outside of `payload_dir`. (SGLang turns a
            ValueError into HTTP status 400.)
    """
    try:
        data = _read(packed)
        # A safetensors file begins with the length of its JSON header.
        length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + length])["__metadata__"]
        tensors = load(data)
        if metadata["format"] != _FORMAT:
            raise ValueError(f"its format is {metadata['format']}, this plug-in reads {_FORMAT}")
        description = json.loads(metadata["description"])
        media = tuple(
            MediaItem(tensors[f"frames_{index}"], bool(item["is_video"]), int(item["first_token"]))
            for index, item in enumerate(description["media"])
        )
        patches = description["patches"]
        patches |= {key: tuple(patches[key]) for key in ("pixel_mean", "pixel_std")}
        return Payload(media, tensors["positions"].long(), PatchSettings(**patches), str(description["salt"]))
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise ValueError(
            f"the images and videos of a prompt cannot be read: {error!r}; trainer and server must run the same version"
        ) from error


def _serialize(payload: Payload) -> bytes:
    media = [{"is_video": item.is_video, "first_token": item.first_token} for item in payload.media]
    description = {"media": media, "patches": asdict(payload.patches), "salt": payload.salt}
    tensors = {f"frames_{index}": item.frames.contiguous() for index, item in enumerate(payload.media)}
    tensors["positions"] = payload.positions.to(torch.int32).contiguous()
    return save(tensors, {"format": _FORMAT, "description": json.dumps(description)})


def _read(packed: str) -> bytes:
    """Return the bytes of a packed payload. A request must not be able to make the server read arbitrary files."""
    if packed.startswith(INLINE_PREFIX):
        try:
            return base64.b64decode(packed.removeprefix(INLINE_PREFIX), validate=True)
        except binascii.Error as error:
            raise ValueError(str(error)) from error
    path = Path(packed.removeprefix(FILE_PREFIX))
    # The parent is compared as a string of parts, so a path with ".." is rejected, too.
    if path.parent != payload_dir() or path.is_symlink():
        raise ValueError(f"{path} is not in {payload_dir()}")
    return path.read_bytes()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().numpy().data.cast("B")
