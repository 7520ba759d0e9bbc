"""Import of a Hugging Face model: conversion to a Megatron checkpoint, a few megabytes at a time.

Every Megatron tensor is split by rows into chunks. A chunk is read row block by row block from the safetensors files
into a buffer and written from there, so that no large tensor is ever whole in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch

from megatron_vcr1.checkpoint.hf_weights import HfWeights
from megatron_vcr1.checkpoint.model_dir import MEGATRON_DIR, copy_model_files
from megatron_vcr1.checkpoint.new_directory import Progress, new_directory, no_progress
from megatron_vcr1.checkpoint.torch_dist import ChunkData, write_chunks, write_metadata
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import TensorLayout, model_layout
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.collectives import run_on_every_rank, run_on_first_rank

CHUNK_BYTES = 16 * 2**20  # small enough for the allocator to reuse the memory, large enough for sequential I/O


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows [start, stop) of a Megatron tensor."""

    layout: TensorLayout
    start: int
    stop: int

    def num_bytes(self, weights: HfWeights) -> int:
        return (self.stop - self.start) * self.layout.num_columns * weights.dtype(self.layout).itemsize


def import_checkpoint(hf_dir: Path, out_dir: Path, *, progress: Progress = no_progress) -> int:
    """Import a Hugging Face model. All ranks of the job call this together and each converts a part of the chunks.

    Args:
        hf_dir: directory with config.json, safetensors files, tokenizer and processor.
        out_dir: a new directory for the imported model; see `model_dir` for its files.
        progress: see `new_directory.Progress`.

    Returns:
        Size of the weights in bytes, over all ranks.

    Raises:
        UserError: the input is incomplete or damaged, ``out_dir`` exists, or the disk is too small. ``out_dir`` is
            not created.
        OSError: the disk failed. ``out_dir`` is not created.
    """
    layouts = model_layout(ModelConfig.from_pretrained(hf_dir))
    with (
        HfWeights(hf_dir, layouts) as weights,
        new_directory(out_dir, weights.num_bytes) as partial,
    ):
        megatron_dir = partial / MEGATRON_DIR
        run_on_first_rank(megatron_dir.mkdir)
        ranges = [part for layout in layouts.values() for part in _split_rows(layout, weights.dtype(layout).itemsize)]
        tensors = _read_chunks(weights, ranges[mesh.rank() :: mesh.num_ranks()], progress)
        written = run_on_every_rank(lambda: write_chunks(megatron_dir / f"__{mesh.rank()}_0.distcp", tensors))
        specs = {key: (weights.dtype(layout), layout.shape) for key, layout in layouts.items()}
        run_on_first_rank(lambda: write_metadata(megatron_dir, specs, chain.from_iterable(written)))
        run_on_first_rank(lambda: copy_model_files(hf_dir, partial))
        return weights.num_bytes


def _split_rows(layout: TensorLayout, itemsize: int) -> Iterator[RowRange]:
    """Split a tensor into row ranges of at most CHUNK_BYTES.

    Their number is a power of two, so that the shards of the usual tensor-parallel sizes begin at chunk boundaries.
    """
    num_rows = layout.shape[0]
    num_chunks = 1
    while num_rows * layout.num_columns * itemsize > num_chunks * CHUNK_BYTES and num_chunks < num_rows:
        num_chunks *= 2
    rows_per_chunk = -(-num_rows // num_chunks)
    for start in range(0, num_rows, rows_per_chunk):
        yield RowRange(layout, start, min(start + rows_per_chunk, num_rows))


def _read_chunks(weights: HfWeights, ranges: list[RowRange], progress: Progress) -> Iterator[ChunkData]:
    """Read row ranges as chunks. All chunks share one buffer: advancing the iterator overwrites the last tensor."""
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
