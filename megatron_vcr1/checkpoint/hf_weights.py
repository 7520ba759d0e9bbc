"""The tensors of a set of safetensors files, located by their published names and checked against the model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from megatron_vcr1.checkpoint.model_dir import read_headers
from megatron_vcr1.checkpoint.safetensors_io import SafetensorsHeader, SafetensorsReader, StoredTensor
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.hf_layout import EMBEDDING_KEY, TensorLayout, published_name

_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class TensorLocation:
    """A tensor and the file that contains it."""

    file: str
    tensor: StoredTensor


def locate_tensors(
    headers: Mapping[str, SafetensorsHeader], layouts: Mapping[str, TensorLayout], where: Path
) -> dict[str, tuple[TensorLocation, ...]]:
    """Locate every tensor of the model in a set of safetensors files.

    Args:
        headers: headers of the files, by file name.
        layouts: the model's tensors.
        where: directory or file to name in error messages.

    Returns:
        Locations of each tensor by published name. Each tensor has one location, with one exception: if the embedding
        is tied to the head, some programs write the head as well, and the embedding has two.

    Raises:
        UserError: a tensor is missing, unknown, duplicated or has the wrong shape, or tensors that form one Megatron
            tensor have different dtypes.
    """
    shapes = {name: layout.shapes_in_files(name) for layout in layouts.values() for name in layout.hf_shapes}
    locations: dict[str, tuple[TensorLocation, ...]] = {name: () for name in shapes}
    unexpected = []
    files: dict[str, str] = {}
    for file, header in headers.items():
        for tensor in header.tensors:
            name = published_name(tensor.name, shapes)
            if name in files:
                raise UserError(f"{where}: {name} exists twice, in {files[name]} and in {file}; remove one of them")
            files[name] = file
            if name == _HEAD and _HEAD not in shapes:
                name = layouts[EMBEDDING_KEY].blocks[0].hf_name
            if name not in shapes:
                unexpected.append(f"{tensor.name} ({file})")
            elif tensor.shape not in shapes[name]:
                implied = " or ".join(map(str, shapes[name]))
                raise UserError(
                    f"{where}: {tensor.name} in {file} has shape {tensor.shape}, but config.json implies {implied}"
                )
            else:
                locations[name] += (TensorLocation(file, tensor),)
    if unexpected:
        raise UserError(
            f"{where}: unexpected tensors: {_abbreviate(unexpected)}; config.json describes a model without them"
        )
    missing = [name for name, found in locations.items() if not found]
    if missing:
        raise UserError(
            f"{where}: missing tensors: {_abbreviate(missing)}; download the model's files again, or correct "
            "config.json"
        )
    for layout in layouts.values():
        _check_same_dtype(layout, locations, where)
    return locations


def _check_same_dtype(layout: TensorLayout, locations: Mapping[str, tuple[TensorLocation, ...]], where: Path) -> None:
    dtypes = {found.tensor.name: found.tensor.dtype for name in layout.hf_shapes for found in locations[name]}
    if len(set(dtypes.values())) > 1:
        listed = ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items())
        raise UserError(
            f"{where}: tensors that form one Megatron tensor have different dtypes: {listed}; save the model in one "
            "dtype"
        )


def _abbreviate(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class HfWeights:
    """The weights of a Hugging Face directory, open for reading row by row. A context manager."""

    def __init__(self, hf_dir: Path, layouts: Mapping[str, TensorLayout]) -> None:
        """Open and check all files.

        Raises:
            UserError: see `read_headers` and `locate_tensors`.
        """
        self.hf_dir = hf_dir
        self.headers = read_headers(hf_dir)
        self.locations = locate_tensors(self.headers, layouts, hf_dir)
        with ExitStack() as stack:
            self._readers = {file: stack.enter_context(SafetensorsReader(hf_dir / file)) for file in self.headers}
            self._files = stack.pop_all()

    @property
    def num_bytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.num_bytes for header in self.headers.values() for tensor in header.tensors)

    def dtype(self, layout: TensorLayout) -> torch.dtype:
        """Return the dtype of the Hugging Face tensors that form a Megatron tensor."""
        return self.locations[layout.blocks[0].hf_name][0].tensor.dtype

    def read_rows(self, layout: TensorLayout, start: int, rows: Tensor) -> None:
        """Read consecutive rows of a Megatron tensor, padding included.

        Args:
            layout: the Megatron tensor.
            start: the first row to read.
            rows: [num_rows, layout.num_columns], contiguous and of `dtype(layout)`; overwritten.

        Raises:
            UserError: the head of a model with tied embeddings differs from the embedding.
        """
        if layout.is_padded:
            rows.zero_()
        for block in layout.blocks_in(start, start + rows.shape[0]):
            target = rows[block.row : block.row + block.num_rows, : layout.num_hf_columns]
            if target.is_contiguous() and not layout.is_transposed:
                self._fill(block.hf_name, block.hf_row, target)
            else:
                source = self.read_hf_rows(block.hf_name, block.hf_row, block.num_rows)
                target.copy_(layout.from_hf_rows(source, self.locations[block.hf_name][0].tensor.shape))

    def read_hf_rows(self, name: str, row: int, num_rows: int) -> Tensor:
        """Return rows of a Hugging Face tensor by its published name: [num_rows, num_columns], in the stored dtype."""
        tensor = self.locations[name][0].tensor
        rows = torch.empty(num_rows, tensor.num_columns, dtype=tensor.dtype)
        self._fill(name, row, rows)
        return rows

    def _fill(self, name: str, row: int, rows: Tensor) -> None:
        """Read rows of a Hugging Face tensor into `rows`, and check that a tied head, if it is stored, has the same."""
        first, *copies = self.locations[name]
        self._readers[first.file].read_rows(first.tensor, row, rows)
        for copy in copies:
            other = torch.empty_like(rows)
            self._readers[copy.file].read_rows(copy.tensor, row, other)
            if not torch.equal(other.view(torch.uint8), rows.view(torch.uint8)):
                raise UserError(
                    f"{self.hf_dir}: {first.tensor.name} and {copy.tensor.name} differ, but config.json ties them; "
                    "set tie_word_embeddings to false"
                )

    def close(self) -> None:
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
