"""Means and their bootstrap distribution, by numpy alone."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

NUM_RESAMPLES = 2000
SEED = 0
_RESAMPLES_AT_ONCE = 100


class ClusteredMeans:
    """Means of samples that come in clusters, over all samples or over the means of their categories.

    Questions about one video are not independent, so that videos are resampled, not questions. A mean of categories
    leaves a category out of a resample that holds none of its samples.
    """

    def __init__(
        self, values: Matrix, clusters: Sequence[Hashable], categories: Sequence[Hashable] | None = None
    ) -> None:
        """Sums once what every resample weighs anew.

        Args:
            values: [num_samples, num_metrics], at least one sample.
            clusters: of each sample.
            categories: of each sample, to average categories; None averages samples.
        """
        cluster_index, self.num_clusters = _numbered(clusters)
        category_index, num_categories = _numbered(categories or [0] * len(values))
        place = category_index * self.num_clusters + cluster_index
        shape = (num_categories, self.num_clusters)
        self._counts = np.bincount(place, minlength=shape[0] * shape[1]).reshape(shape)
        sums = [np.bincount(place, column, minlength=shape[0] * shape[1]).reshape(shape) for column in values.T]
        self._sums = np.stack(sums, axis=-1)  # [num_categories, num_clusters, num_metrics]

    def mean(self) -> Matrix:
        """[num_metrics]."""
        return self._weighted(np.ones((1, self.num_clusters)))[0]

    def resampled(self, num_resamples: int = NUM_RESAMPLES, seed: int = SEED) -> Matrix:
        """Means of as many clusters drawn with replacement: [num_resamples, num_metrics]."""
        random = np.random.default_rng(seed)
        chances = np.full(self.num_clusters, 1 / self.num_clusters)
        sizes = [
            min(_RESAMPLES_AT_ONCE, num_resamples - start) for start in range(0, num_resamples, _RESAMPLES_AT_ONCE)
        ]
        return np.concatenate([self._weighted(random.multinomial(self.num_clusters, chances, size)) for size in sizes])

    def _weighted(self, weights: NDArray[np.number]) -> Matrix:
        """Means with each cluster taken so many times; weights [num_resamples, num_clusters]."""
        counts = np.einsum("rc,gc->gr", weights, self._counts)
        sums = np.einsum("rc,gcm->grm", weights, self._sums, optimize=True)
        with np.errstate(invalid="ignore"):
            means = sums / counts[..., None]  # NaN for a category without samples
        return np.nanmean(means, axis=0)


def percentile_interval(resampled: Matrix, level: float = 0.95) -> tuple[Matrix, Matrix]:
    """Bounds of the middle `level` of the resamples [num_resamples, ...]."""
    tail = (1 - level) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
    return low, high


def _numbered(names: Sequence[Hashable]) -> tuple[NDArray[np.intp], int]:
    """Each name's number, in order of appearance, and how many there are."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], dtype=np.intp), len(numbers)
