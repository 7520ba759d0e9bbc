"""Means of clustered samples and their bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

NUM_RESAMPLES = 2000
SEED = 0
_RESAMPLES_PER_CHUNK = 100  # bounds the memory of a chunk's weights


class ClusteredMeans:
    """Means of samples that come in clusters, over all samples or over the means of their categories.

    Questions about the same video are not independent, so videos are resampled instead of questions. A mean of
    categories leaves a category out of a resample that holds none of its samples.
    """

    def __init__(
        self, values: Matrix, clusters: Sequence[Hashable], categories: Sequence[Hashable] | None = None
    ) -> None:
        """Compute the sums that all resamples share.

        Args:
            values: [num_samples, num_metrics], at least one sample.
            clusters: the cluster of each sample.
            categories: the category of each sample, to average over categories; None averages over samples.
        """
        cluster_index, self.num_clusters = _enumerate(clusters)
        category_index, num_categories = _enumerate(categories or [0] * len(values))
        place = category_index * self.num_clusters + cluster_index
        shape = (num_categories, self.num_clusters)
        self._counts = np.bincount(place, minlength=shape[0] * shape[1]).reshape(shape)
        sums = [np.bincount(place, column, minlength=shape[0] * shape[1]).reshape(shape) for column in values.T]
        self._sums = np.stack(sums, axis=-1)  # [num_categories, num_clusters, num_metrics]

    def mean(self) -> Matrix:
        """Return the means [num_metrics]."""
        return self._weighted(np.ones((1, self.num_clusters)))[0]

    def resampled(self, num_resamples: int = NUM_RESAMPLES, seed: int = SEED) -> Matrix:
        """Return the means of resamples: as many clusters as there are, drawn with replacement.

        Returns:
            [num_resamples, num_metrics].
        """
        random = np.random.default_rng(seed)
        chances = np.full(self.num_clusters, 1 / self.num_clusters)
        sizes = [
            min(_RESAMPLES_PER_CHUNK, num_resamples - start) for start in range(0, num_resamples, _RESAMPLES_PER_CHUNK)
        ]
        return np.concatenate([self._weighted(random.multinomial(self.num_clusters, chances, size)) for size in sizes])

    def _weighted(self, weights: NDArray[np.number]) -> Matrix:
        """Return the means with each cluster counted as often as its weight.

        Args:
            weights: [num_resamples, num_clusters].

        Returns:
            [num_resamples, num_metrics].
        """
        counts = np.einsum("rc,gc->gr", weights, self._counts)
        sums = np.einsum("rc,gcm->grm", weights, self._sums, optimize=True)
        with np.errstate(invalid="ignore"):
            means = sums / counts[..., None]  # NaN for a category without samples
        return np.nanmean(means, axis=0)


def percentile_interval(resampled: Matrix, level: float = 0.95) -> tuple[Matrix, Matrix]:
    """Return the bounds of the middle `level` of the resamples [num_resamples, ...]."""
    tail = (1 - level) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
    return low, high


def _enumerate(names: Sequence[Hashable]) -> tuple[NDArray[np.intp], int]:
    """Number the names in order of first appearance.

    Returns:
        The number of each name, and how many different names there are.
    """
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], dtype=np.intp), len(numbers)
