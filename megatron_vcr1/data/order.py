"""The order of samples: a pure function of the sources, the seed and the position.

A run consumes an endless sequence of positions 0, 1, 2, ... Rank r of n takes positions r, r + n, r + 2n, ... The
sample at a position depends only on the data, the weights and the seed. Therefore a run that stopped at any position
resumes exactly, with any number of ranks.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_vcr1.errors import UserError
from megatron_vcr1.types import Sample


@dataclass(frozen=True, slots=True)
class Source:
    """A manifest with its weight in the training mix.

    Attributes:
        name: name for error messages; also part of the seed of the source's shuffles.
        samples: the manifest's samples, at least one.
        weight: share of the positions, relative to the other sources. If no source has a weight, each is weighted by
            its number of samples, so that every sample occurs once per epoch.
    """

    name: str
    samples: Sequence[Sample]
    weight: float | None = None

    def __post_init__(self) -> None:
        if not self.samples:
            raise UserError(f"source {self.name}: no samples")
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise UserError(
                f"source {self.name}: the weight must be above 0, got {self.weight}; to leave a source out, remove it"
            )


class SampleOrder:
    """Mapping from positions to samples.

    An epoch has as many positions as there are samples. Each source gets its share of them, rounded by largest
    remainder, at shuffled places. A source goes through its samples in shuffled passes of its own: no sample is
    repeated before all others of its source have been used. A shuffle sorts by hashes, not by a random generator, so
    that it is the same with every version of Python and of every library.
    """

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        """Compute each source's share of an epoch.

        Raises:
            UserError: only some of the sources have weights, or a source's share is rounded to 0.
        """
        if not sources:
            raise UserError("no data sources; name at least one manifest in data.sources")
        if len({source.weight is None for source in sources}) > 1:
            raise UserError("some data sources have a weight and some do not; give a weight to all of them or to none")
        self._sources = tuple(sources)
        self._seed = seed
        self.epoch_size = sum(len(source.samples) for source in sources)
        self._shares = _shares([source.weight or len(source.samples) for source in sources], self.epoch_size)
        for source, share in zip(sources, self._shares, strict=True):
            if share == 0:
                raise UserError(
                    f"source {source.name}: its weight gives it none of the {self.epoch_size} positions of an epoch; "
                    "raise the weight or remove the source"
                )

    def sample_at(self, position: int, attempt: int = 0) -> Sample:
        """Return the sample at a position; an attempt above 0 returns a substitute from the same source."""
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
        """Return the index of the source of a position's sample."""
        return self._draw(*divmod(position, self.epoch_size))[0]

    def _draw(self, epoch: int, place: int) -> tuple[int, int]:
        """Return the source at a place of an epoch, and the number of earlier draws from that source in this epoch."""
        return _epoch_draws(self._shares, self._seed, epoch)[place]

    def fingerprint(self) -> str:
        """Return a hash of everything that determines the order: sample ids, sources, their shares, and the seed."""
        digest = hashlib.blake2b(repr((self._seed, self._shares)).encode(), digest_size=16)
        for source in self._sources:
            digest.update(repr((source.name, [sample.id for sample in source.samples])).encode())
        return digest.hexdigest()


def _shares(weights: Sequence[float], num_positions: int) -> tuple[int, ...]:
    """Divide `num_positions` in proportion to the weights, into whole numbers rounded by largest remainder."""
    exact = [weight / sum(weights) * num_positions for weight in weights]
    shares = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda index: (shares[index] - exact[index], index))
    for index in by_remainder[: num_positions - sum(shares)]:
        shares[index] += 1
    return tuple(shares)


@lru_cache(maxsize=4)  # an epoch is a list of millions of entries; positions are read almost in order
def _epoch_draws(shares: tuple[int, ...], seed: int, epoch: int) -> list[tuple[int, int]]:
    """Return (source, number of the draw from that source in this epoch) for each place of an epoch."""
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
    """Return a permutation of range(num_items) that depends only on the arguments."""
    return sorted(range(num_items), key=lambda item: _digest(seed, purpose, number, item))


def _digest(seed: int, purpose: str, number: int, item: int) -> bytes:
    # Checkpoints depend on this format. Changing it changes the order of every data set, and no run resumes exactly.
    return hashlib.blake2b(f"{seed}/{purpose}/{number}/{item}".encode(), digest_size=16).digest()
