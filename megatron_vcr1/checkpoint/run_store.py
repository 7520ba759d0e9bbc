"""The checkpoints of a training run.

Each is a directory ``step_N`` that holds
    config.json, tokenizer, hf_layout.json    as in an imported directory (see model_dir): whatever takes one takes it
    megatron/                                 the weights, and the optimizer's state
    state.json                                steps, schedule, and what the trainer wants to find again
    checksums.json                            length and CRC-32 of every other file
It is written under a hidden name, and gets its own when all ranks have written and everything is on the disk. So
whatever ends the processes, at any instant, leaves the last whole one.

With ``checkpoint.asynchronous`` each rank copies its share to the host's memory, and a thread writes it while training
goes on. The threads agree over a process group of their own: their collectives never come between the training's.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor, nn

from megatron_vcr1.checkpoint.disk import Checksum, publish, sync_directory
from megatron_vcr1.checkpoint.integrity import check_files, write_checksums
from megatron_vcr1.checkpoint.model_dir import MEGATRON_DIR, STATE_FILE, copy_model_files, write_durably
from megatron_vcr1.checkpoint.optimizer_state import num_updates, optimizer_pieces, set_num_updates
from megatron_vcr1.checkpoint.pieces import Piece, cut, parameter_pieces, read_pieces, shard_of_replica
from megatron_vcr1.checkpoint.torch_dist import Chunk, Kind, read_metadata, write_chunks, write_metadata
from megatron_vcr1.config.training_sections import CheckpointSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.collectives import run_on_every_rank, run_on_first_rank

logger = logging.getLogger(__name__)

_STATE_VERSION = 2
_LOCK_FILE = ".lock"
_OTHER_FILES_BYTES = 2**26  # tokenizer, configuration, indices
LOCK_PATIENCE_S = 120.0  # how long the file system may hold the lock of a process whose node has died
_LOCK_POLL_S = 1.0
_PATIENCE = datetime.timedelta(hours=2)  # of a rank, for the slowest disk of the others

NamedChunk = tuple[str, tuple[int, ...], Tensor]  # key, offsets in the global tensor, values


class Schedule(Protocol):
    """A learning-rate schedule; its state is numbers and strings."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class _Share:
    """What a rank wrote."""

    file: str
    chunks: list[Chunk]
    checksum: Checksum
    kinds: dict[str, Kind]  # of the global tensors, by key


class RunStore:
    """Saves, finds and loads the checkpoints of a run. All ranks call every method together."""

    def __init__(self, directory: Path, section: CheckpointSection) -> None:
        """Take possession of ``directory``, after parallel.mesh.initialize, and remove what dead runs left half done.

        Raises:
            UserError: another process is training there, and goes on for `LOCK_PATIENCE_S`.
        """
        self._directory = directory
        self._section = section
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._newest: int | None = None  # step of the newest checkpoint that this run found or wrote
        run_on_first_rank(self._take_possession, self._group)

    def _take_possession(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._lock = (self._directory / _LOCK_FILE).open("w")
        self._wait_for_lock()
        for leftover in self._directory.glob(".step_*"):
            logger.info("%s: removed, a run ended while it was at it", leftover)
            with _removal_may_fail(leftover):
                shutil.rmtree(leftover)

    def _wait_for_lock(self) -> None:
        """A job that Slurm started again may be here before the lock of its first start is gone."""
        deadline = time.monotonic() + LOCK_PATIENCE_S
        told = False
        while not self._lock_is_ours():
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{self._directory}: another process is training here; end it, or choose another train.run_dir"
                )
            if not told:
                told = True
                logger.warning(
                    "%s: another process holds this folder's lock; waiting %.0f s for it to end, as it may have "
                    "already, on a node that died",
                    self._directory,
                    LOCK_PATIENCE_S,
                )
            time.sleep(_LOCK_POLL_S)

    def _lock_is_ours(self) -> bool:
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            logger.warning("%s: no locks on this file system (%s); start no second run here", self._directory, error)
        return True

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: MegatronOptimizer,
        scheduler: Schedule,
        state: Mapping[str, Any],
        model_dir: Path,
    ) -> None:
        """Save, or begin to: with ``asynchronous``, the checkpoint is there at the next call at the latest.

        Args:
            step: training steps done; when this run has saved this step already, or began from it, nothing is done.
            model: this rank's share, bare or wrapped.
            optimizer: megatron-core's, distributed or not.
            scheduler: see `Schedule`.
            state: JSON values that `load` is to return; those of rank 0 are kept.
            model_dir: the model that the run began with, for its configuration and tokenizer.

        Raises:
            UserError, OSError: the disk is full or failed, in this save or in the one before, which nothing had
                reported yet. Earlier checkpoints are as they were.
        """
        self.finish()
        if step == self._newest:
            return
        content = {
            "version": _STATE_VERSION,
            "step": step,
            "updates": max(run_on_every_rank(lambda: num_updates(optimizer), self._group)),
            "schedule": scheduler.state_dict(),
            "state": state,
        }
        text = json.dumps(content, indent=1)
        pieces = _pieces_to_write(model, optimizer)
        if not self._section.asynchronous:
            self._write(step, pieces, _one_by_one(pieces), text, model_dir)
            return
        copies = _copy_to_host(pieces)

        def write() -> None:
            try:
                self._write(step, pieces, copies, text, model_dir)
            except BaseException as error:  # raised by the next call, in the thread that trains
                self._failure = error

        self._writer = threading.Thread(target=write, name=f"checkpoint of step {step}", daemon=True)
        self._writer.start()

    def finish(self) -> None:
        """Wait until the last `save` is done. Raises what it failed with."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    @property
    def has_failed(self) -> bool:
        """Whether this rank's share of a `save` under way has failed; the next call of a method raises it."""
        return self._failure is not None

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint; None when there is none. Damaged ones are named and set aside."""
        self.finish()
        steps = run_on_first_rank(lambda: saved_steps(self._directory), self._group)
        self._newest = next(filter(self._is_whole, reversed(steps)), None)
        return self._newest

    def _is_whole(self, step: int) -> bool:
        path = self.path(step)
        try:
            run_on_every_rank(lambda: check_files(path, share=mesh.rank(), num_shares=mesh.num_ranks()), self._group)
        except UserError as error:
            aside = path.with_name(f"{path.name}.damaged")
            if mesh.rank() == 0:
                logger.warning("%s; moved to %s, and the checkpoint before it is used", error, aside.name)
            run_on_first_rank(lambda: _replace(path, aside), self._group)
            return False
        return True

    def load(self, step: int, model: nn.Module, optimizer: MegatronOptimizer, scheduler: Schedule) -> dict[str, Any]:
        """Continue from a checkpoint, at whatever layout it was written.

        Returns:
            The ``state`` that was saved with it.

        Raises:
            UserError: it is damaged, or of another model, precision or choice of frozen parts; names the tensor.
        """
        self.finish()
        content = run_on_first_rank(lambda: self._read_state(step), self._group)
        run_on_every_rank(lambda: _load_tensors(self.path(step) / MEGATRON_DIR, model, optimizer), self._group)
        set_num_updates(optimizer, content["updates"])
        scheduler.load_state_dict(content["schedule"])
        return content["state"]

    def path(self, step: int) -> Path:
        """The directory of a checkpoint."""
        return self._directory / f"step_{step}"

    def _read_state(self, step: int) -> dict[str, Any]:
        path = self.path(step) / STATE_FILE
        try:
            content = json.loads(path.read_text())
            version = content["version"]
            missing = {"updates", "schedule", "state"} - content.keys()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: damaged or missing ({error!r})") from None
        if version != _STATE_VERSION or missing:
            raise UserError(
                f"{path}: of version {version}, and this program reads version {_STATE_VERSION}; choose another "
                "train.run_dir, with the checkpoint as model.path"
            )
        return content

    def _write(self, step: int, pieces: list[Piece], chunks: Iterable[NamedChunk], state: str, model_dir: Path) -> None:
        num_bytes = sum(run_on_every_rank(lambda: sum(piece.values.nbytes for piece in pieces), self._group))
        with _full_disk_explained(self._directory, step):
            partial = run_on_first_rank(lambda: _make_partial(self._directory, step, num_bytes), self._group)
            try:
                shares = run_on_every_rank(lambda: _write_share(partial / MEGATRON_DIR, pieces, chunks), self._group)
                run_on_first_rank(lambda: self._publish(step, partial, shares, state, model_dir), self._group)
            finally:
                if mesh.rank() == 0:
                    shutil.rmtree(partial, ignore_errors=True)  # gone when all went well
        self._newest = step

    def _publish(self, step: int, partial: Path, shares: list[_Share], state: str, model_dir: Path) -> None:
        kinds = {key: kind for share in shares for key, kind in share.kinds.items()}
        write_metadata(partial / MEGATRON_DIR, kinds, chain.from_iterable(share.chunks for share in shares))
        copy_model_files(model_dir, partial)
        write_durably(partial / STATE_FILE, state.encode())
        write_checksums(partial, {f"{MEGATRON_DIR}/{share.file}": share.checksum for share in shares})
        _replace(partial, self.path(step))
        self._remove_old()

    def _remove_old(self) -> None:
        """Keep what the settings say, and try again what could not be removed before."""
        for leftover in self._directory.glob(".step_*.removed-*"):
            with _removal_may_fail(leftover):
                shutil.rmtree(leftover)
        steps, every = saved_steps(self._directory), self._section.keep_every
        for step in steps[: -self._section.keep_last]:
            if every is None or step % every:
                with _removal_may_fail(self.path(step)):
                    _remove(self.path(step))


def saved_steps(directory: Path) -> list[int]:
    """Steps that have a checkpoint in a run's checkpoint directory, in ascending order."""
    matches = (re.fullmatch(r"step_(\d+)", path.name) for path in directory.glob("step_*") if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def _pieces_to_write(model: nn.Module, optimizer: MegatronOptimizer) -> list[Piece]:
    """What this rank writes: its share of what every copy of the model has, and what its copy alone has."""
    parameters = parameter_pieces(_bare(model))
    common = [*chain.from_iterable(parameters.values()), *optimizer_pieces(optimizer, parameters, divided=False)]
    own = optimizer_pieces(optimizer, parameters, divided=True)
    shared = shard_of_replica([piece for piece in common if piece.is_main], mesh.replica_index(), mesh.num_replicas())
    return [*shared, *(piece for piece in own if piece.is_main)]


def _bare(model: nn.Module) -> Any:
    """The model inside megatron-core's wrappers for data parallelism and mixed precision."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def _one_by_one(pieces: list[Piece]) -> Iterator[NamedChunk]:
    for key, offsets, values in cut(pieces):
        yield key, offsets, values.to("cpu", copy=True)


def _copy_to_host(pieces: list[Piece]) -> list[NamedChunk]:
    copies = []
    for key, offsets, values in cut(pieces):
        copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
        copies.append((key, offsets, copy.copy_(values, non_blocking=True)))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return copies


@contextmanager
def _full_disk_explained(directory: Path, step: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{directory}: disk full while step {step} was saved; free space, or keep fewer checkpoints "
            f"(checkpoint.keep_last, keep_every). Those of earlier steps are whole"
        ) from error


def _make_partial(directory: Path, step: int, num_bytes: int) -> Path:
    """Under a name of its own: a rank of a dead run that has not noticed yet must not find it."""
    needed, free = num_bytes + _OTHER_FILES_BYTES, shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free", str(directory))
    partial = directory / f".step_{step}.partial-{secrets.token_hex(4)}"
    (partial / MEGATRON_DIR).mkdir(parents=True)
    return partial


def _write_share(megatron_dir: Path, pieces: list[Piece], chunks: Iterable[NamedChunk]) -> _Share:
    checksum = Checksum()
    file = f"__{mesh.rank()}_0.distcp"
    written = write_chunks(megatron_dir / file, chunks, checksum)
    kinds = {piece.key: (piece.values.dtype, piece.global_shape) for piece in pieces}
    return _Share(file, written, checksum, kinds)


def _load_tensors(megatron_dir: Path, model: nn.Module, optimizer: MegatronOptimizer) -> None:
    tensors = read_metadata(megatron_dir)
    parameters = parameter_pieces(_bare(model))
    weights = list(chain.from_iterable(parameters.values()))
    for piece in weights:
        stored = tensors.get(piece.key)
        if stored is not None and stored.dtype != piece.values.dtype:
            kinds = f"{piece.key} is {stored.dtype}, and this run's is {piece.values.dtype}".replace("torch.", "")
            raise UserError(f"{megatron_dir}: {kinds}; continue with the model.dtype that it was saved with")
    states = chain.from_iterable(optimizer_pieces(optimizer, parameters, divided=divided) for divided in (False, True))
    read_pieces(megatron_dir, tensors, [*weights, *states])


def _replace(source: Path, target: Path) -> None:
    """Rename a directory, durably; one that has this name already makes way."""
    if target.exists():
        _remove(target)
    publish(source, target)


def _remove(path: Path) -> None:
    """Remove a directory that has a name people trust: first the name, then the files.

    Raises:
        OSError: it keeps its name. Files that cannot be removed are left under a hidden name.
    """
    hidden = path.with_name(f".{path.name}.removed-{secrets.token_hex(4)}")
    os.rename(path, hidden)
    sync_directory(path.parent)
    with _removal_may_fail(hidden):
        shutil.rmtree(hidden)


@contextmanager
def _removal_may_fail(path: Path) -> Iterator[None]:
    """An old checkpoint that stays costs room on the disk, and not the run."""
    try:
        yield
    except OSError as error:
        logger.warning("%s: cannot be removed (%s); tried again when the next checkpoint is written", path, error)
