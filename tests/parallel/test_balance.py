from __future__ import annotations

import itertools
import random

from megatron_vcr1.parallel.balance import imbalance, longest_first


def _largest_sum(costs: list[float], bins: tuple[int, ...] | list[int], num_bins: int) -> float:
    return max(sum(cost for cost, index in zip(costs, bins, strict=True) if index == b) for b in range(num_bins))


def test_longest_first_is_close_to_the_best_assignment() -> None:
    generator = random.Random(0)
    for _ in range(20):
        costs = [generator.uniform(1, 10) for _ in range(7)]
        best = min(_largest_sum(costs, bins, 3) for bins in itertools.product(range(3), repeat=len(costs)))
        assert _largest_sum(costs, longest_first(costs, 3), 3) <= best * (4 / 3 - 1 / 9)


def test_equal_costs_are_dealt_by_number_in_order() -> None:
    assert longest_first([2.0] * 6, 3) == [0, 1, 2, 0, 1, 2]
    assert longest_first([], 3) == []


def test_imbalance_is_the_largest_sum_over_the_mean() -> None:
    assert imbalance([3.0, 1.0, 2.0], [0, 1, 0], 2) == 5 / 3
    assert imbalance([], [], 4) == 1
