"""Integrity of a checkpoint: checksums.json lists the length and CRC-32 of every file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from megatron_vcr1.checkpoint.disk import Checksum, checksum_of, write_durably
from megatron_vcr1.checkpoint.model_dir import CHECKSUMS_FILE
from megatron_vcr1.errors import UserError
from megatron_vcr1.json_fields import Fields


def write_checksums(directory: Path, known: Mapping[str, Checksum]) -> None:
    """Write checksums.json for all files of a directory, durably.

    Args:
        directory: a directory whose files are complete.
        known: checksums that were computed while writing, by path relative to ``directory``. The other files are read.
    """
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    checksums = {name: asdict(known.get(name) or checksum_of(directory / name)) for name in names}
    write_durably(directory / CHECKSUMS_FILE, json.dumps(checksums, indent=1).encode())


def check_files(directory: Path, *, share: int = 0, num_shares: int = 1) -> None:
    """Check the files of a directory against its checksums.json.

    Every call checks the length of every file. The content of the files is split among ``num_shares`` callers, usually
    the ranks: this call reads every ``num_shares``-th file, starting with number ``share``.

    Raises:
        UserError: a file is missing, truncated or changed; the message names the file.
    """
    path = directory / CHECKSUMS_FILE
    listed = _read_checksums(path)
    for index, (name, expected) in enumerate(sorted(listed.items())):
        file = directory / name
        num_bytes = file.stat().st_size if file.is_file() else None
        if num_bytes != expected.num_bytes:
            found = "it is missing" if num_bytes is None else f"it has {num_bytes}"
            raise UserError(f"{file}: {expected.num_bytes} bytes were written, {found}; the checkpoint is damaged")
        if index % num_shares == share and checksum_of(file) != expected:
            raise UserError(f"{file}: the content is not what was written (CRC-32 differs); the checkpoint is damaged")


def _read_checksums(path: Path) -> dict[str, Checksum]:
    try:
        entries = {name: Fields(entry, name) for name, entry in Fields.from_file(path).values.items()}
        return {
            name: Checksum(
                entry.integer("num_bytes", minimum=0, maximum=2**62),
                entry.integer("crc32", minimum=0, maximum=2**32 - 1),
            )
            for name, entry in entries.items()
        }
    except UserError as error:
        raise UserError(f"{path}: damaged or missing ({str(error).removeprefix(f'{path}: ')})") from None
