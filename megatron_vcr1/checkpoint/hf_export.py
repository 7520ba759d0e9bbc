"""Export of an imported model or a training checkpoint to a Hugging Face directory, chunk by chunk.

hf_layout.json determines the position of every byte in every safetensors file. So each chunk is read once, in any order
and by any number of processes, and its rows are written to their positions. Chunks that cover only some columns of
their tensor (tensor-parallel training shards some tensors by columns) are written row by row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from megatron_vcr1.checkpoint.model_dir import copy_model_files
from megatron_vcr1.checkpoint.new_directory import Progress, new_directory, no_progress
from megatron_vcr1.checkpoint.safetensors_io import SafetensorsWriter, create_safetensors
from megatron_vcr1.checkpoint.stored_model import StoredModel, StoredRows, open_model
from megatron_vcr1.checkpoint.torch_dist import Chunk
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.collectives import run_on_every_rank, run_on_first_rank


@dataclass(frozen=True, slots=True)
class ExportResult:
    """Summary of an export."""

    num_bytes: int  # size of the weights
    casts: dict[str, int]  # for each conversion of dtype, such as "float32 to bfloat16", the number of row blocks


def export_checkpoint(model_dir: Path, out_dir: Path, *, progress: Progress = no_progress) -> ExportResult:
    """Export a model. All ranks of the job call this together and each converts a part of the chunks.

    Tensors get the names, dtypes and files that they had in the Hugging Face directory that was imported.

    Args:
        model_dir: an imported model, or a training checkpoint.
        out_dir: a new directory, which `transformers` can load.
        progress: see `new_directory.Progress`.

    Raises:
        UserError: the input is incomplete or damaged, ``out_dir`` exists, or the disk is too small. ``out_dir`` is
            not created.
        OSError: the disk failed. ``out_dir`` is not created.
    """
    model = open_model(model_dir)
    with new_directory(out_dir, model.num_bytes) as partial:
        run_on_first_rank(lambda: _create_files(partial, model))
        casts = sum(run_on_every_rank(lambda: _write_chunks(model, partial, progress)), Counter[str]())
        run_on_first_rank(lambda: copy_model_files(model_dir, partial, hf_layout=False))
    return ExportResult(model.num_bytes, dict(casts))


def _create_files(directory: Path, model: StoredModel) -> None:
    for name, header in model.headers.items():
        create_safetensors(directory / name, header)


def _write_chunks(model: StoredModel, directory: Path, progress: Progress) -> Counter[str]:
    """Write this rank's part of the chunks to the safetensors files; returns the conversions of dtype."""
    casts: Counter[str] = Counter()
    with ExitStack() as stack:
        writers = {name: stack.enter_context(closing(SafetensorsWriter(directory / name))) for name in model.headers}
        chunks = model.chunks[mesh.rank() :: mesh.num_ranks()]
        total = sum(chunk.num_bytes for chunk in chunks)
        for chunk, stored in _read_ahead(model, chunks):
            for rows in stored:
                for location in model.locations[rows.hf_name]:
                    dtype = location.tensor.dtype
                    if rows.values.dtype != dtype:
                        casts[f"{rows.values.dtype} to {dtype}".replace("torch.", "")] += 1
                    values = rows.values.to(dtype)
                    writers[location.file].write_rows(location.tensor, rows.row, rows.column, values)
            progress(chunk.num_bytes, total)
    return casts


def _read_ahead(model: StoredModel, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, list[StoredRows]]]:
    """Yield each chunk with its rows, while a thread reads the next chunk.

    At most two chunks are in memory. The thread ends with the iterator, also when the caller raises an exception.
    """

    def read(chunk: Chunk) -> tuple[Chunk, list[StoredRows]]:
        return chunk, list(model.read(chunk))

    with ThreadPoolExecutor(max_workers=1) as reader:
        pending = [reader.submit(read, chunk) for chunk in chunks[:1]]
        for chunk in chunks[1:]:
            pending.append(reader.submit(read, chunk))
            yield pending.pop(0).result()
        for last in pending:
            yield last.result()
