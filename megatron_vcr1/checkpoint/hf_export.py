"""Imported or trained directory to Hugging Face directory, chunk by chunk.

The manifest says where every byte of every safetensors file belongs, so the stored chunks are read once, in any order
and by any number of processes, and their rows are written to their places. Tensor-parallel training cuts some tensors
by columns; of those, each row's piece is written on its own.
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
    """What an export wrote."""

    num_bytes: int  # of weights
    casts: dict[str, int]  # changes of dtype ("float32 to bfloat16") and the number of tensors' parts that had them


def export_checkpoint(model_dir: Path, out_dir: Path, *, progress: Progress = no_progress) -> ExportResult:
    """Export an imported or trained directory; of several processes in torch.distributed each takes a share.

    Tensors get the names, dtypes and files that they had when the model was imported.

    Args:
        model_dir: what `import_checkpoint` or training wrote.
        out_dir: a new directory, which `transformers` loads.
        progress: see `workers.Progress`.

    Raises:
        UserError: bad input, named; ``out_dir`` exists; the disk is too small. Nothing is left under ``out_dir``.
        OSError: a fault of the disk. Nothing is left under ``out_dir``.
    """
    model = open_model(model_dir)
    with new_directory(out_dir, model.num_bytes) as partial:
        run_on_first_rank(lambda: _create_files(partial, model))
        casts = sum(run_on_every_rank(lambda: _write_share(model, partial, progress)), Counter[str]())
        run_on_first_rank(lambda: copy_model_files(model_dir, partial, manifest=False))
    return ExportResult(model.num_bytes, dict(casts))


def _create_files(directory: Path, model: StoredModel) -> None:
    for name, header in model.headers.items():
        create_safetensors(directory / name, header)


def _write_share(model: StoredModel, directory: Path, progress: Progress) -> Counter[str]:
    """Write this process's share of the chunks into the files of ``directory``; returns the changes of dtype."""
    casts: Counter[str] = Counter()
    with ExitStack() as stack:
        writers = {name: stack.enter_context(closing(SafetensorsWriter(directory / name))) for name in model.headers}
        chunks = model.chunks[mesh.rank() :: mesh.num_ranks()]
        total = sum(chunk.num_bytes for chunk in chunks)
        for chunk, stored in _read_ahead(model, chunks):
            for rows in stored:
                for place in model.places[rows.hf_name]:
                    dtype = place.tensor.dtype
                    if rows.values.dtype != dtype:
                        casts[f"{rows.values.dtype} to {dtype}".replace("torch.", "")] += 1
                    values = rows.values.to(dtype)
                    writers[place.file].write_rows(place.tensor, rows.row, rows.column, values)
            progress(chunk.num_bytes, total)
    return casts


def _read_ahead(model: StoredModel, chunks: Sequence[Chunk]) -> Iterator[tuple[Chunk, list[StoredRows]]]:
    """Each chunk and its rows; the next one is read while the caller writes this one."""

    def read(chunk: Chunk) -> tuple[Chunk, list[StoredRows]]:
        return chunk, list(model.read(chunk))

    with ThreadPoolExecutor(max_workers=1) as reader:
        ahead = [reader.submit(read, chunk) for chunk in chunks[:1]]
        for chunk in chunks[1:]:
            ahead.append(reader.submit(read, chunk))
            yield ahead.pop(0).result()
        for last in ahead:
            yield last.result()
