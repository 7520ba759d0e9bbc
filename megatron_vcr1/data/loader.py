"""The order of samples, a pure function of seed and position; and the loader that decodes ahead of the training step.

A run sees an endless sequence of positions 0, 1, 2, ... of which rank r of n takes r, r + n, r + 2n, ... What lies at
a position depends on the data, the weights and the seed alone, so that a run that stopped after some number of
positions goes on exactly, on any number of ranks.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import multiprocessing
import os
import signal
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from megatron_vcr1 import timeline
from megatron_vcr1.data.prompts import PreparedSample, PromptTooLongError
from megatron_vcr1.data.signals import start_fork_server
from megatron_vcr1.data.video import VideoError
from megatron_vcr1.errors import UserError
from megatron_vcr1.types import VideoSample

S = TypeVar("S")
T = TypeVar("T")

Prepare = Callable[[VideoSample], PreparedSample]

MAX_ATTEMPTS = 8
"""Samples tried at one position; if all of them fail, the videos' folder is more likely gone than eight files bad."""


@dataclass(frozen=True, slots=True)
class Source:
    """Samples that are drawn together, for example the manifest of one task.

    Attributes:
        samples: at least one.
        weight: share of the positions relative to the other sources; None for all sources: their numbers of samples,
            so that each sample comes once an epoch.
    """

    name: str
    samples: Sequence[VideoSample]
    weight: float | None = None

    def __post_init__(self) -> None:
        if not self.samples:
            raise UserError(f"source {self.name}: no samples")
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise UserError(f"source {self.name}: the weight must be above 0, got {self.weight}; leave the source out")


class SampleOrder:
    """Which sample lies at which position.

    An epoch has as many positions as there are samples; each source holds its share of them (rounded by largest
    remainder), at shuffled places. A source goes through its samples in shuffled passes of its own, so that none
    comes a second time before all others came. Shuffles sort by hashes: they are the same with every library version.
    """

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        """Raises UserError if only some sources have weights, or a source's share of an epoch rounds to nothing."""
        if not sources:
            raise UserError("no data sources; name at least one manifest")
        if len({source.weight is None for source in sources}) > 1:
            raise UserError("some data sources have a weight and some have none; give all of them one, or none")
        self._sources = tuple(sources)
        self._seed = seed
        self.epoch_size = sum(len(source.samples) for source in sources)
        self._shares = _shares([source.weight or len(source.samples) for source in sources], self.epoch_size)
        for source, share in zip(sources, self._shares, strict=True):
            if share == 0:
                raise UserError(f"source {source.name}: its weight gives it none of {self.epoch_size} positions")

    def sample_at(self, position: int, attempt: int = 0) -> VideoSample:
        """The sample at a position; attempts above 0 name substitutes of the same source, should it be unusable."""
        epoch, place = divmod(position, self.epoch_size)
        source_index, draw_in_epoch = self._draw(epoch, place)
        source = self._sources[source_index]
        samples = source.samples
        if attempt > 0:
            digest = _digest(self._seed, "substitute", position, attempt)
            return samples[int.from_bytes(digest, "big") % len(samples)]
        draw = epoch * self._shares[source_index] + draw_in_epoch
        pass_number, index = divmod(draw, len(samples))
        return samples[_shuffled(len(samples), self._seed, f"pass of {source.name}", pass_number)[index]]

    def source_at(self, position: int) -> int:
        """Index of the source that a position's sample comes from."""
        return self._draw(*divmod(position, self.epoch_size))[0]

    def _draw(self, epoch: int, place: int) -> tuple[int, int]:
        """(source, how many-th draw of it in this epoch) at a place of an epoch."""
        return _epoch_draws(self._shares, self._seed, epoch)[place]

    def fingerprint(self) -> str:
        """Changes with anything that changes the order: the samples' ids, the sources, their weights, the seed."""
        digest = hashlib.blake2b(repr((self._seed, self._shares)).encode(), digest_size=16)
        for source in self._sources:
            digest.update(repr((source.name, [sample.id for sample in source.samples])).encode())
        return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class SkippedSample:
    """A sample that could not be used, and why."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class LoadedSample:
    """What a position gave: the prepared sample, None if all attempts failed, and the samples tried before it.

    Attributes:
        span: when it was prepared, and by which worker.
    """

    prepared: PreparedSample | None
    skipped: tuple[SkippedSample, ...]
    span: timeline.Span


class PromptLoader:
    """Iterates over this rank's prepared samples, without end, decoding ahead in worker processes.

    Every rank must take the same number of samples before `state_dict` is called: then all ranks return the same
    state, and any number of ranks goes on from it.
    """

    def __init__(
        self,
        order: SampleOrder,
        prepare: Prepare | Sequence[Prepare],
        *,
        rank: int = 0,
        num_ranks: int = 1,
        num_workers: int = 0,
        prefetch_per_worker: int = 2,
    ) -> None:
        """Starts at position 0; nothing is decoded before the first iteration.

        Args:
            order: what lies where.
            prepare: decodes and encodes a sample, raising VideoError or PromptTooLongError for one that cannot be used;
                with workers it is pickled. One for all sources, or one each.
            rank: this data-parallel rank.
            num_ranks: the data-parallel size.
            num_workers: decoding processes; 0 decodes in this one.
            prefetch_per_worker: samples that a worker holds ready.
        """
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank {rank} of {num_ranks} ranks does not exist")
        self._order = order
        self._prepare = prepare
        self._rank = rank
        self._num_ranks = num_ranks
        self._num_workers = num_workers
        self._prefetch_per_worker = prefetch_per_worker
        self._next_position = 0
        self.skipped: list[SkippedSample] = []
        """Samples that this rank could not use since the start or the last resume."""

    def __iter__(self) -> Generator[PreparedSample, None, None]:
        """Goes on where the last iteration or the loaded state ended.

        Raises:
            UserError: at one position no sample could be used; lists what was tried.
        """
        for loaded in self._loaded():
            timeline.add(loaded.span)
            self.skipped.extend(loaded.skipped)
            if loaded.prepared is None:
                tried = "\n".join(f"  {skip.id}: {skip.reason}" for skip in loaded.skipped)
                raise UserError(f"{MAX_ATTEMPTS} samples in a row cannot be used; are the videos there?\n{tried}")
            self._next_position += self._num_ranks
            yield loaded.prepared

    @property
    def position(self) -> int:
        """Where the next sample of this rank lies in the order."""
        return self._next_position + self._rank

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on; counts the samples handed out, not those decoded ahead."""
        return {"next_position": self._next_position, "order": self._order.fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after a checkpoint's last sample at the next iteration.

        Raises:
            UserError: the data, their weights or the seed are not those of the checkpoint.
        """
        if state["order"] != self._order.fingerprint():
            raise UserError(
                "the run's checkpoint was written with other data (ids, order or weights of the sources) or another "
                "train.seed, so that it cannot go on exactly; restore them, or choose another train.run_dir, with "
                "the checkpoint as model.path"
            )
        self._next_position = state["next_position"]

    def _loaded(self) -> Iterable[LoadedSample]:
        positions = itertools.count(self.position, self._num_ranks)
        return decode_ahead(
            partial(_prepare_one, prepare=self._prepare),
            map(self._choices_at, positions),
            num_workers=self._num_workers,
            prefetch_per_worker=self._prefetch_per_worker,
        )

    def _choices_at(self, position: int) -> _Choices:
        samples = [self._order.sample_at(position, attempt) for attempt in range(MAX_ATTEMPTS)]
        return _Choices(self._order.source_at(position), tuple(samples))


def decode_ahead(
    make: Callable[[S], T], items: Iterable[S], *, num_workers: int, prefetch_per_worker: int = 2
) -> Iterable[T]:
    """``make(item)`` of every item, in order, made in processes that end with this one.

    Items are sent to them one by one: a manifest of millions of rows stays in this process.

    Args:
        num_workers: 0 makes them in this process.
    """
    if num_workers:
        start_fork_server()
    return DataLoader(
        _Made(make),
        sampler=items,  # type: ignore[arg-type]  # what the data set is indexed with
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch_per_worker if num_workers else None,
        # fork would copy locks that decoder and communication threads hold
        multiprocessing_context="forkserver" if num_workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=_end_with_the_reader,
        # without one of its own DataLoader draws from the global generator, and a resumed run would diverge
        generator=torch.Generator(),
    )


class _Made(Dataset[T]):
    """What a function makes of whatever this is indexed with."""

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make = make

    def __getitem__(self, item: Any) -> T:
        return self._make(item)


@dataclass(frozen=True, slots=True)
class _Choices:
    """The sample that lies at a position, and those that take its place if it cannot be used."""

    source: int
    samples: tuple[VideoSample, ...]


def _prepare_one(choices: _Choices, prepare: Prepare | Sequence[Prepare]) -> LoadedSample:
    """The first of the samples that can be used; runs in the workers."""
    prepare = prepare if callable(prepare) else prepare[choices.source]
    start_ns = time.time_ns()
    prepared: PreparedSample | None = None
    skipped: list[SkippedSample] = []
    for sample in choices.samples:
        try:
            prepared = prepare(sample)
            break
        except (VideoError, PromptTooLongError) as error:
            skipped.append(SkippedSample(sample.id, str(error)))
    span = timeline.Span(f"prepare {sample.id}", _track(), start_ns, time.time_ns())
    return LoadedSample(prepared, tuple(skipped), span)


def _track() -> str:
    """Who decodes here: a worker process, or this thread itself."""
    worker = get_worker_info()
    return threading.current_thread().name if worker is None else f"decoding worker {worker.id}"


def _as_it_is(loaded: Any) -> Any:
    return loaded


def _end_with_the_reader(worker_id: int) -> None:
    """Have this worker end with the process that reads from it, also when that is killed: DataLoader's own watch is on
    the fork server, which lives as long as its workers do. And have it end on that process's SIGTERM, though not on the
    scheduler's (`start_fork_server` blocks both): a reader that fails sends it, then waits for its workers.
    """
    reader = multiprocessing.parent_process()
    assert reader is not None

    def watch() -> None:
        reader.join()
        os._exit(1)

    def listen() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != reader.pid:
            pass
        os._exit(1)

    threading.Thread(target=watch, name="end with the reader", daemon=True).start()
    threading.Thread(target=listen, name="end when the reader says so", daemon=True).start()


def _shares(weights: Sequence[float], num_positions: int) -> tuple[int, ...]:
    """Whole numbers in proportion to the weights, summing to num_positions, rounded by largest remainder."""
    exact = [weight / sum(weights) * num_positions for weight in weights]
    shares = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: (shares[index] - exact[index], index))
    for index in by_remainder[: num_positions - sum(shares)]:
        shares[index] += 1
    return tuple(shares)


@lru_cache(maxsize=4)
def _epoch_draws(shares: tuple[int, ...], seed: int, epoch: int) -> list[tuple[int, int]]:
    """(source, how many-th draw of it in this epoch) at each place of an epoch."""
    ends = list(itertools.accumulate(shares))
    num_drawn = [0] * len(shares)
    draws = []
    for slot in _shuffled(ends[-1], seed, "epoch", epoch):
        source_index = bisect_right(ends, slot)
        draws.append((source_index, num_drawn[source_index]))
        num_drawn[source_index] += 1
    return draws


@lru_cache(maxsize=64)
def _shuffled(num_items: int, seed: int, purpose: str, number: int) -> list[int]:
    return sorted(range(num_items), key=lambda item: _digest(seed, purpose, number, item))


def _digest(seed: int, purpose: str, number: int, item: int) -> bytes:
    return hashlib.blake2b(f"{seed}/{purpose}/{number}/{item}".encode(), digest_size=16).digest()
