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
import fcntl
import hashlib
import json
import math
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from megatron_vcr1.errors import UserError
from megatron_vcr1.text_files import parse_json, require_object

INLINE_PREFIX = "data:application/x-vcr1;base64,"
FILE_PREFIX = "vcr1-file:"
_FORMAT = "1"
_FILE_NAME = re.compile(r"[0-9a-f]{32}\.safetensors")


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
    """One image or video of a prompt, or one temporal patch of a video, if each has its own run of pads."""

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


@contextmanager
def _open_payload_dir() -> Iterator[int]:
    """Open the folder of payload files, and create it first if it is missing. Yields its file descriptor.

    /dev/shm belongs to everybody, so another user may have created anything under the folder's name. Files are opened
    relative to this descriptor: a folder that is replaced after the check has no effect.

    Raises:
        PermissionError: it is not a directory that only this user can use.
    """
    folder = payload_dir()
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:  # a symbolic link, or no directory
        raise PermissionError(
            f"{folder} is not a directory of this user ({error.strerror}); have its owner remove it"
        ) from error
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to another user; have its owner remove it")
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise PermissionError(f"{folder} is open to other users; run: chmod 700 {folder}")
        yield descriptor
    finally:
        os.close(descriptor)


def payload_dir() -> Path:
    """Return the folder of payload files. Only this user can write there, and servers read no other files."""
    return Path("/dev/shm") / f"vcr1-{os.getuid()}"


# The open files of this process's payloads, by name. Each is locked (flock) until it is removed: the lock tells other
# processes that its owner is alive. A process id would not tell, because containers may share /dev/shm without sharing
# process ids. The kernel releases the lock when the process ends, however it ends.
_locked_files: dict[str, int] = {}


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
    content = _serialize(payload)
    with _open_payload_dir() as folder:
        name, descriptor = _create_locked_file(folder)
        packed = f"{FILE_PREFIX}{payload_dir() / name}"
        _locked_files[name] = descriptor
        try:
            with open(descriptor, "wb", closefd=False) as file:
                file.write(content)
        except BaseException:
            remove_file(packed)
            raise
    return packed


def _create_locked_file(folder: int) -> tuple[str, int]:
    """Create a file with a random name and lock it. Returns the name and the file descriptor, which holds the lock."""
    while True:
        name = f"{uuid.uuid4().hex}.safetensors"
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=folder)
        # Between the two calls, `remove_orphans` of another process may lock the file and remove it.
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink > 0:
                return name, descriptor
        os.close(descriptor)


def remove_file(packed: str) -> None:
    """Remove the file of a payload that this process has packed; does nothing for an inline payload."""
    if not packed.startswith(FILE_PREFIX):
        return
    name = Path(packed.removeprefix(FILE_PREFIX)).name
    descriptor = _locked_files.pop(name, None)
    if descriptor is None:
        return  # removed before
    with suppress(FileNotFoundError), _open_payload_dir() as folder:
        os.unlink(name, dir_fd=folder)
    os.close(descriptor)


def remove_own_files() -> None:
    """Remove the files of all payloads that this process has packed and not removed."""
    for name in list(_locked_files):
        remove_file(f"{FILE_PREFIX}{name}")


def remove_orphans() -> None:
    """Remove the payload files of processes that ended without removing them: those that nobody has locked.

    Anything else in the folder is left alone: names of another pattern, and what is not a regular file of this user.

    Raises:
        PermissionError: the folder is not a directory that only this user can use.
    """
    with _open_payload_dir() as folder:
        for name in os.listdir(folder):
            with suppress(OSError):  # removed meanwhile, or locked by its owner, who is alive
                descriptor = _open_payload_file(folder, name)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name, dir_fd=folder)
                finally:
                    os.close(descriptor)


def _open_payload_file(folder: int, name: str) -> int:
    """Open a payload file for reading and return its file descriptor.

    Raises:
        PermissionError: the name is not of a payload file, or it is not a regular file of this user.
        OSError: it cannot be opened.
    """
    if not _FILE_NAME.fullmatch(name):
        raise PermissionError(f"{name!r} is not the name of a payload file")
    # O_NONBLOCK: without it, opening a FIFO would wait for a writer.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=folder)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid():
        os.close(descriptor)
        raise PermissionError(f"{name} is not a regular file of this user")
    return descriptor


def is_payload(item: object) -> bool:
    """Return whether an entry of `video_data` is a packed payload."""
    return isinstance(item, str) and item.startswith((INLINE_PREFIX, FILE_PREFIX))


def unpack(packed: str) -> Payload:
    """Read a payload that was packed inline or into a file. It may come from anybody who reaches the server.

    Raises:
        ValueError: the payload is damaged, has another format or impossible values, or its file is outside of
            `payload_dir`. (SGLang turns a ValueError into HTTP status 400.)
    """
    try:
        data = _read(packed)
        # A safetensors file begins with the length of its JSON header.
        length = int.from_bytes(data[:8], "little")
        header = require_object(parse_json(data[8 : 8 + length], "the header"), "the header")
        metadata = header["__metadata__"]
        tensors = load(data)
        if metadata["format"] != _FORMAT:
            raise ValueError(f"its format is {metadata['format']}, this plug-in reads {_FORMAT}")
        description = require_object(parse_json(metadata["description"], "the description"), "the description")
        media = tuple(
            MediaItem(tensors[f"frames_{index}"], bool(item["is_video"]), item["first_token"])
            for index, item in enumerate(description["media"])
        )
        patches = dict(description["patches"])
        patches |= {key: tuple(patches[key]) for key in ("pixel_mean", "pixel_std")}
        payload = Payload(media, tensors["positions"].long(), PatchSettings(**patches), str(description["salt"]))
        _check(payload)
        return payload
    # What reading a payload of another version, or a damaged one, raises.
    except (ValueError, KeyError, TypeError, OSError, SafetensorError, UserError) as error:
        raise ValueError(
            f"the images and videos of a prompt cannot be read: {error!r}; trainer and server must run the same version"
        ) from error


def _check(payload: Payload) -> None:
    """Refuse values with which a server would fail or allocate too much memory. Raises ValueError."""
    patches = payload.patches
    for name, limit in (("patch_size", 256), ("temporal_patch_size", 16), ("merge_size", 16)):
        value = getattr(patches, name)
        if type(value) is not int or not 1 <= value <= limit:
            raise ValueError(f"{name} is {value!r}; it must be an integer from 1 to {limit}")
    for name in ("pixel_mean", "pixel_std"):
        values = getattr(patches, name)
        if len(values) != 3 or not all(type(value) in (int, float) and math.isfinite(value) for value in values):
            raise ValueError(f"{name} must be three numbers")
    if min(patches.pixel_std) <= 0:
        raise ValueError("pixel_std must be positive")
    if payload.positions.dim() != 2 or payload.positions.shape[0] != 3 or payload.positions.shape[1] == 0:
        raise ValueError(f"positions have the shape {list(payload.positions.shape)} instead of [3, prompt_tokens]")
    pixels_per_token = patches.patch_size * patches.merge_size
    for index, item in enumerate(payload.media):
        frames = item.frames
        if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[3] != 3 or frames.numel() == 0:
            raise ValueError(f"item {index}: frames must be uint8 [num_frames, height, width, 3]")
        if frames.shape[1] % pixels_per_token or frames.shape[2] % pixels_per_token:
            raise ValueError(f"item {index}: the sides of its frames must be multiples of {pixels_per_token}")
        last = payload.positions.shape[1] - payload.num_tokens(item)
        if type(item.first_token) is not int or not 0 <= item.first_token <= last:
            raise ValueError(f"item {index}: it does not fit into the prompt at token {item.first_token!r}")


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
    if path.parent != payload_dir():
        raise ValueError(f"{path} is not in {payload_dir()}")
    with _open_payload_dir() as folder, open(_open_payload_file(folder, path.name), "rb") as file:
        return file.read()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().numpy().data.cast("B")
