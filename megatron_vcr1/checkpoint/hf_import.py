"""Hugging Face directory to imported directory, a few megabytes at a time.

Every Megatron tensor is cut by rows into chunks. A chunk is read block by block from the safetensors files into one
buffer and written from there, so no large tensor is ever whole in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from megatron_vcr1.checkpoint.hf_weights import HfWeights
from megatron_vcr1.checkpoint.model_dir import MEGATRON_DIR, copy_model_files
from megatron_vcr1.checkpoint.new_directory import Progress, new_directory, no_progress
from megatron_vcr1.checkpoint.torch_dist import write_chunks, write_metadata
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import TensorLayout, model_layout
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.collectives import run_on_every_rank, run_on_first_rank

CHUNK_BYTES = 16 * 2**20  # small enough for the allocator to reuse, large enough to stream


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows [start, stop) of a Megatron tensor."""

    layout: TensorLayout
    start: int
    stop: int

    def num_bytes(self, weights: HfWeights) -> int:
        return (self.stop - self.start) * self.layout.num_columns * weights.dtype(self.layout).itemsize


def import_checkpoint(hf_dir: Path, out_dir: Path, *, progress: Progress = no_progress) -> int:
    """Import a Hugging Face directory; of several processes in torch.distributed each takes a share.

    Args:
        hf_dir: config.json, safetensors and the files beside them.
        out_dir: a new directory; see model_dir for what it will hold.
        progress: see `workers.Progress`.

    Returns:
        Bytes of weights converted, by all processes.

    Raises:
        UserError: bad input, named; ``out_dir`` exists; the disk is too small. Nothing is left under ``out_dir``.
        OSError: a fault of the disk. Nothing is left under ``out_dir``.
    """
    layouts = model_layout(ModelConfig.from_pretrained(hf_dir))
    with (
        HfWeights(hf_dir, layouts) as weights,
        new_directory(out_dir, weights.num_bytes) as partial,
    ):
        megatron_dir = partial / MEGATRON_DIR
        run_on_first_rank(megatron_dir.mkdir)
        ranges = [part for layout in layouts.values() for part in _cut(layout, weights.dtype(layout).itemsize)]
        tensors = _read(weights, ranges[mesh.rank() :: mesh.num_ranks()], progress)
        written = run_on_every_rank(lambda: write_chunks(megatron_dir / f"__{mesh.rank()}_0.distcp", tensors))
        kinds = {key: (weights.dtype(layout), layout.shape) for key, layout in layouts.items()}
        run_on_first_rank(lambda: write_metadata(megatron_dir, kinds, chain.from_iterable(written)))
        run_on_first_rank(lambda: copy_model_files(hf_dir, partial))
        return weights.num_bytes


def _cut(layout: TensorLayout, itemsize: int) -> Iterator[RowRange]:
    """Chunks of at most CHUNK_BYTES; a power of two of them, so that tensor-parallel shards begin where they do."""
    num_rows = layout.shape[0]
    num_chunks = 1
    while num_rows * layout.num_columns * itemsize > num_chunks * CHUNK_BYTES and num_chunks < num_rows:
        num_chunks *= 2
    rows_each = -(-num_rows // num_chunks)
    for start in range(0, num_rows, rows_each):
        yield RowRange(layout, start, min(start + rows_each, num_rows))


def _read(
    weights: HfWeights, ranges: list[RowRange], progress: Progress
) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Yields (key, offsets, tensor); the tensor lies in a buffer that the next one overwrites."""
    total = sum(part.num_bytes(weights) for part in ranges)
    buffer = bytearray()
    for part in ranges:
        layout, num_rows = part.layout, part.stop - part.start
        dtype = weights.dtype(layout)
        num_bytes = part.num_bytes(weights)
        if len(buffer) < num_bytes:
            buffer = bytearray(num_bytes)
        rows = torch.frombuffer(buffer, dtype=dtype, count=num_rows * layout.num_columns).view(
            num_rows, layout.num_columns
        )
        weights.read_rows(layout, part.start, rows)
        progress(num_bytes, total)
        shape = (num_rows, *layout.shape[1:])
        yield layout.key, (part.start, *(0 for _ in layout.shape[1:])), rows.view(shape)
