"""Saving, finding and loading the checkpoints of a training run, so that a crash at any instant loses none of them.

A checkpoint is a directory ``step_N`` with
    config.json, tokenizer, hf_layout.json    as in an imported model (see model_dir), so it can be used as one
    megatron/                                 weights and optimizer state
    state.json                                step, learning-rate schedule, trainer state (see training_state)
    checksums.json                            length and CRC-32 of all other files

Crash consistency. A save has these steps, and a crash before the last one leaves only a hidden directory:
1. Rank 0 creates a hidden directory and all ranks learn its name.
2. Every rank writes its chunks to a file of its own there, and fsyncs it.
3. When all ranks have done so, rank 0 writes and fsyncs the index, the model files, state.json and checksums.json.
4. Rank 0 fsyncs the directories, renames the hidden one to step_N, and fsyncs the parent (`disk.publish`).
5. Rank 0 removes old checkpoints, each of them with a rename to a hidden name first (`step_dirs`).
So step_N exists only with durable, complete content. If the disk damages it later, `latest` notices, because the
checksums differ, and uses the checkpoint before it. An error on one rank is raised on all of them (see
`collectives.run_on_every_rank`), so no rank waits for one that has failed.

Threads. With ``checkpoint.asynchronous``, `save` copies the rank's tensors to host memory and starts a background
thread on every rank, which does the five steps while training continues. These threads communicate through a gloo
process group of their own: the collectives of a group must be called in the same order on all ranks, and if the
background threads and training shared a group, the order of their calls would differ from rank to rank. The main
thread uses that group only while no background thread runs, which `finish` ensures at the start of every method.
"""

from __future__ import annotations

import datetime
import errno
import logging
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import nn

from megatron_vcr1.checkpoint.background_task import BackgroundTask
from megatron_vcr1.checkpoint.fingerprint import weights_fingerprint
from megatron_vcr1.checkpoint.integrity import check_files, write_checksums
from megatron_vcr1.checkpoint.model_dir import MEGATRON_DIR, copy_model_files
from megatron_vcr1.checkpoint.optimizer_state import num_updates, set_num_updates
from megatron_vcr1.checkpoint.run_lock import lock_run
from megatron_vcr1.checkpoint.shard_slices import ShardSlice
from megatron_vcr1.checkpoint.step_dirs import (
    create_partial,
    remove_leftovers,
    remove_old,
    replace_directory,
    saved_steps,
    step_dir,
)
from megatron_vcr1.checkpoint.torch_dist import ChunkData, write_metadata
from megatron_vcr1.checkpoint.training_state import TrainingState, read_state, write_state
from megatron_vcr1.checkpoint.training_tensors import (
    RankFile,
    copy_lazily,
    copy_to_host,
    load_tensors,
    slices_to_write,
    unwrap,
    write_rank_file,
)
from megatron_vcr1.config.training_sections import CheckpointSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.collectives import run_on_every_rank, run_on_first_rank

logger = logging.getLogger(__name__)

# How long a rank waits for the other ranks in a collective of a save: as long as the slowest rank's disk may take.
_COLLECTIVE_TIMEOUT = datetime.timedelta(hours=2)


class Schedule(Protocol):
    """A learning-rate schedule. Its state consists of numbers and strings."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class RunStore:
    """The checkpoints of one run. All ranks call every method together, and from the main thread."""

    def __init__(self, directory: Path, section: CheckpointSection) -> None:
        """Lock a checkpoint directory for this run, and remove incomplete checkpoints of earlier runs.

        Args:
            directory: the run's checkpoint directory; created if it does not exist.
            section: which checkpoints to keep, and whether to write in the background.

        Raises:
            UserError: another process is training there, and still does after `run_lock.LOCK_TIMEOUT_S`, or the
                directory is not on a file system that all nodes share.
        """
        self._directory = directory
        self._section = section
        self._group = dist.new_group(backend="gloo", timeout=_COLLECTIVE_TIMEOUT)
        self._task = BackgroundTask()
        self._newest: int | None = None  # step of the newest checkpoint that this run has found or written
        self._reference: str | None = None  # fingerprint of the reference's weights
        self._needs_reference = False
        run_on_first_rank(self._open_directory, self._group)
        _check_is_shared(directory, self._group)

    def _open_directory(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._lock = lock_run(self._directory)  # held until this object is gone or the process ends
        remove_leftovers(self._directory)

    def pin_reference(self, model: nn.Module) -> None:
        """Store a fingerprint of the model's present weights in every checkpoint, and require it on resume.

        Call this if a KL term compares the policy with the initial weights, which are not part of a checkpoint but are
        loaded from model.path on every start. Call it while the model holds those weights, that is before `load`. Other
        runs do not need the initial weights again, so they may resume with any model.path of the same shape.

        The fingerprint depends on the weights alone. A model that was moved or imported is accepted. Any other weights
        are refused, including an export of the run itself, which would change the reference.
        """
        self._reference = weights_fingerprint(unwrap(model))
        self._needs_reference = True

    def _check_reference(self, step: int, saved: str | None) -> None:
        """Refuse to resume with another reference; see `pin_reference`."""
        if saved is None:
            return
        if self._needs_reference and saved != self._reference:
            raise UserError(
                f"{self.path(step)}: the run was started from other weights than those in model.path, which are the "
                f"reference of the KL term (fingerprint {saved}, now {self._reference}). Set model.path to the model "
                "that the run was started from, or choose another train.run_dir to start a new run from this model.path"
            )
        self._reference = saved  # if no reference is needed now, keep the fingerprint for a later start

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: MegatronOptimizer,
        scheduler: Schedule,
        state: Mapping[str, Any],
        model_dir: Path,
        *,
        best_step: int | None = None,
    ) -> None:
        """Save a checkpoint. With ``checkpoint.asynchronous``, only copy it, and write it in the background.

        A background save is complete when `finish` has returned; `save`, `latest` and `load` call it first. Does
        nothing if this run has already saved this step or was resumed from it.

        Args:
            step: number of training steps done.
            model: this rank's part of the model, bare or in megatron-core's wrappers.
            optimizer: megatron-core's optimizer, distributed or not.
            scheduler: learning-rate schedule.
            state: JSON values of the trainer, which `load` returns. Those of rank 0 are stored.
            model_dir: directory of the initial model, from which configuration and tokenizer are copied.
            best_step: step whose checkpoint the rotation keeps, this one or an earlier one.

        Raises:
            UserError, OSError: the disk is full or failed, in this save or in the previous one if that has not been
                reported yet. Earlier checkpoints are unchanged.
        """
        self.finish()
        if step == self._newest:
            return
        updates = max(run_on_every_rank(lambda: num_updates(optimizer), self._group))
        # Serialized now, because training changes the state while a background thread writes.
        text = TrainingState(step, updates, scheduler.state_dict(), state, self._reference).to_json()
        slices = slices_to_write(model, optimizer)
        if not self._section.asynchronous:
            self._write(step, slices, copy_lazily(slices), text, model_dir, best_step)
            return
        copies = copy_to_host(slices)
        self._task.start(
            lambda: self._write(step, slices, copies, text, model_dir, best_step), name=f"checkpoint of step {step}"
        )

    def finish(self) -> None:
        """Wait until the last `save` is complete. Raises its error if it has failed."""
        self._task.finish()

    @property
    def has_failed(self) -> bool:
        """True if a background save has failed on this rank. `finish` and the other methods raise its error."""
        return self._task.has_failed

    def latest(self) -> int | None:
        """Return the step of the newest intact checkpoint, or None if there is none.

        The ranks check the files together. A damaged checkpoint is reported in the log and renamed to step_N.damaged.
        """
        self.finish()
        steps = run_on_first_rank(lambda: saved_steps(self._directory), self._group)
        self._newest = next(filter(self._is_intact, reversed(steps)), None)
        return self._newest

    def _is_intact(self, step: int) -> bool:
        path = self.path(step)
        try:
            run_on_every_rank(lambda: check_files(path, share=mesh.rank(), num_shares=mesh.num_ranks()), self._group)
        except UserError as error:  # the same error on all ranks
            damaged = path.with_name(f"{path.name}.damaged")
            if mesh.rank() == 0:
                logger.warning("%s; renamed to %s, using the checkpoint before it", error, damaged.name)
            run_on_first_rank(lambda: replace_directory(path, damaged), self._group)
            return False
        return True

    def load(self, step: int, model: nn.Module, optimizer: MegatronOptimizer, scheduler: Schedule) -> dict[str, Any]:
        """Load a checkpoint into model, optimizer and schedule. It may have been written under another layout.

        Returns:
            The trainer state that was saved with it.

        Raises:
            UserError: the checkpoint is damaged, or belongs to another model, reference, dtype or choice of frozen
                parts; the message names the tensor.
        """
        self.finish()
        state = run_on_first_rank(lambda: read_state(self.path(step)), self._group)
        self._check_reference(step, state.reference)
        run_on_every_rank(lambda: load_tensors(self.path(step) / MEGATRON_DIR, model, optimizer), self._group)
        set_num_updates(optimizer, state.num_updates)
        scheduler.load_state_dict(dict(state.schedule))
        return dict(state.trainer)

    def path(self, step: int) -> Path:
        """Return the directory of a step's checkpoint."""
        return step_dir(self._directory, step)

    def _write(
        self,
        step: int,
        slices: list[ShardSlice],
        chunks: Iterable[ChunkData],
        state: str,
        model_dir: Path,
        best_step: int | None,
    ) -> None:
        """Write a checkpoint, in the five steps of the module's docstring.

        Runs on all ranks: in the background thread, or in the main thread for a save during which training waits.
        """
        num_bytes = sum(run_on_every_rank(lambda: sum(part.values.nbytes for part in slices), self._group))
        with _explain_full_disk(self._directory, step):
            partial = run_on_first_rank(lambda: create_partial(self._directory, step, num_bytes), self._group)
            try:
                files = run_on_every_rank(lambda: write_rank_file(partial / MEGATRON_DIR, slices, chunks), self._group)
                run_on_first_rank(lambda: self._complete(step, partial, files, state, model_dir), self._group)
                run_on_first_rank(lambda: self._rotate(best_step), self._group)
            finally:
                if mesh.rank() == 0:
                    shutil.rmtree(partial, ignore_errors=True)  # no longer exists if it was published
        self._newest = step

    def _complete(self, step: int, partial: Path, files: list[RankFile], state: str, model_dir: Path) -> None:
        """Write the files of rank 0 and publish the checkpoint. Runs on rank 0, after all ranks have written."""
        specs = {key: spec for file in files for key, spec in file.specs.items()}
        write_metadata(partial / MEGATRON_DIR, specs, chain.from_iterable(file.chunks for file in files))
        copy_model_files(model_dir, partial)
        write_state(partial, state)
        # Last, because it lists all other files.
        write_checksums(partial, {f"{MEGATRON_DIR}/{file.name}": file.checksum for file in files})
        replace_directory(partial, self.path(step))

    def _rotate(self, best_step: int | None) -> None:
        section = self._section
        remove_old(self._directory, keep_last=section.keep_last, keep_every=section.keep_every, best=best_step)


def _check_is_shared(directory: Path, group: dist.ProcessGroup) -> None:
    """Raise UserError, on all ranks, if a rank does not see a file that rank 0 has written to the directory.

    A run directory on a disk of one node would otherwise be noticed at the first save, after hours of training. The
    file has a new name: NFS clients remember for a while which names they did not find.
    """

    def create() -> tuple[str, str]:
        name = f".shared-{secrets.token_hex(4)}"
        (directory / name).touch()
        return name, socket.gethostname()

    name, first_host = run_on_first_rank(create, group)

    def find() -> None:
        if not (directory / name).exists():
            raise UserError(
                f"{directory}: rank {mesh.rank()} on {socket.gethostname()} does not see what rank 0 on {first_host} "
                "writes there; set train.run_dir to a folder on a file system that all nodes share"
            )

    try:
        run_on_every_rank(find, group)
    finally:
        if mesh.rank() == 0:
            (directory / name).unlink()


@contextmanager
def _explain_full_disk(directory: Path, step: int) -> Iterator[None]:
    """Turn the error of a full disk or an exhausted quota into a UserError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"{directory}: disk full while step {step} was saved; free space, or keep fewer checkpoints "
            "(checkpoint.keep_last, checkpoint.keep_every). Earlier checkpoints are intact"
        ) from error
