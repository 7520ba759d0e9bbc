"""The loader of prepared samples: decodes ahead of the training step, replaces bad samples, and resumes exactly."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_vcr1 import timeline
from megatron_vcr1.data.order import SampleOrder
from megatron_vcr1.data.prompts import PreparedSample, PromptTooLongError
from megatron_vcr1.data.shared_memory import PREFETCH_PER_WORKER
from megatron_vcr1.data.video import VideoError
from megatron_vcr1.data.workers import decode_ahead, worker_name
from megatron_vcr1.errors import UserError
from megatron_vcr1.types import Sample

PrepareFn = Callable[[Sample], PreparedSample]

MAX_ATTEMPTS = 8
"""Number of samples that are tried at one position. If all of them fail, it is more likely that the folder of videos is
missing than that eight files are bad."""


@dataclass(frozen=True, slots=True)
class SkippedSample:
    """A sample that could not be used, and the reason."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class LoadedSample:
    """The result at one position.

    Attributes:
        prepared: the prepared sample; None if all attempts failed.
        skipped: the samples that failed before it.
        span: time of the preparation, and the worker that did it.
    """

    prepared: PreparedSample | None
    skipped: tuple[SkippedSample, ...]
    span: timeline.Span


class PromptLoader:
    """An endless iterator over this rank's prepared samples, which worker processes decode in advance.

    All ranks must take the same number of samples before `state_dict` is called. Their states are then equal, and any
    number of ranks can resume from it.
    """

    def __init__(
        self,
        order: SampleOrder,
        prepare: PrepareFn | Sequence[PrepareFn],
        *,
        rank: int = 0,
        num_ranks: int = 1,
        num_workers: int = 0,
        prefetch_per_worker: int = PREFETCH_PER_WORKER,
    ) -> None:
        """Start at position 0. Nothing is decoded before the first iteration.

        Args:
            order: the order of the samples.
            prepare: function that decodes and encodes a sample, or one such function per source. It raises VideoError
                or PromptTooLongError for a sample that cannot be used. Any other error is a mistake in the code and
                ends the run. It is pickled if there are workers.
            rank: this data-parallel rank.
            num_ranks: data-parallel size.
            num_workers: number of decoding processes; 0 decodes in this process.
            prefetch_per_worker: number of samples that each worker prepares in advance.
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
        """Samples that this rank could not use since the start or since the last resume."""

    def __iter__(self) -> Generator[PreparedSample, None, None]:
        """Continue after the last iteration or the loaded state.

        Raises:
            UserError: none of the samples tried at a position could be used (lists them), or a decoding worker found
                no room in shared memory.
        """
        for loaded in self._loaded():
            timeline.add(loaded.span)
            self.skipped.extend(loaded.skipped)
            if loaded.prepared is None:
                tried = "\n".join(f"  {skip.id}: {skip.reason}" for skip in loaded.skipped)
                raise UserError(f"{MAX_ATTEMPTS} samples in a row cannot be used; do the videos exist?\n{tried}")
            # Advance before yielding: a state saved while the caller holds the sample counts it as consumed.
            self._next_position += self._num_ranks
            yield loaded.prepared

    @property
    def position(self) -> int:
        """Position of this rank's next sample in the order."""
        return self._next_position + self._rank

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint. It counts the samples that were yielded, not those decoded in advance."""
        return {"next_position": self._next_position, "order": self._order.fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next iteration continue after a checkpoint's last sample.

        Raises:
            UserError: the data, their weights or the seed differ from the checkpoint's.
        """
        if state["order"] != self._order.fingerprint():
            raise UserError(
                "the run's checkpoint was written with other data (ids, order or weights of the sources) or another "
                "train.seed, so the run cannot resume exactly; restore them, or choose another train.run_dir, with "
                "the checkpoint as model.path"
            )
        self._next_position = state["next_position"]

    def _loaded(self) -> Iterable[LoadedSample]:
        positions = itertools.count(self.position, self._num_ranks)
        return decode_ahead(
            partial(_prepare_first_usable, prepare=self._prepare),
            map(self._candidates_at, positions),
            num_workers=self._num_workers,
            prefetch_per_worker=self._prefetch_per_worker,
        )

    def _candidates_at(self, position: int) -> _Candidates:
        samples = [self._order.sample_at(position, attempt) for attempt in range(MAX_ATTEMPTS)]
        return _Candidates(self._order.source_at(position), tuple(samples))


@dataclass(frozen=True, slots=True)
class _Candidates:
    """The sample at a position, followed by its substitutes, all from the source with the index `source`."""

    source: int
    samples: tuple[Sample, ...]


def _prepare_first_usable(candidates: _Candidates, prepare: PrepareFn | Sequence[PrepareFn]) -> LoadedSample:
    """Prepare the first candidate that can be used; runs in the workers."""
    prepare = prepare if callable(prepare) else prepare[candidates.source]
    start_ns = time.time_ns()
    prepared: PreparedSample | None = None
    skipped: list[SkippedSample] = []
    for sample in candidates.samples:
        try:
            prepared = prepare(sample)
            break
        except (VideoError, PromptTooLongError) as error:  # only these are about the data
            skipped.append(SkippedSample(sample.id, str(error)))
    span = timeline.Span(f"prepare {sample.id}", worker_name(), start_ns, time.time_ns())
    return LoadedSample(prepared, tuple(skipped), span)
