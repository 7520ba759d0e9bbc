"""Assignment of work to replicas or ranks, so that all of them have about equally much."""

from __future__ import annotations

from collections.abc import Sequence


def longest_first(costs: Sequence[float], num_bins: int) -> list[int]:
    """Assign each cost to a bin: from the largest to the smallest, each to the bin with the lowest sum so far.

    The largest sum is at most 4/3 of the best possible one (Graham 1969, SIAM J. Appl. Math. 17).

    Returns:
        The bin of each cost. Equal costs and equal sums go in order, so every rank computes the same bins.
    """
    sums = [0.0] * num_bins
    bins = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        bins[index] = min(range(num_bins), key=lambda candidate: (sums[candidate], candidate))
        sums[bins[index]] += costs[index]
    return bins


def imbalance(costs: Sequence[float], bins: Sequence[int], num_bins: int) -> float:
    """Return the largest sum of a bin over the mean of all bins; 1 without costs."""
    sums = [0.0] * num_bins
    for cost, index in zip(costs, bins, strict=True):
        sums[index] += cost
    return max(sums) * num_bins / sum(sums) if sum(sums) else 1.0
