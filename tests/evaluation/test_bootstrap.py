from __future__ import annotations

import numpy as np
import pytest

from megatron_vcr1.evaluation.bootstrap import ClusteredMeans, percentile_interval


def interval(values: np.ndarray, clusters: list[int] | None = None) -> tuple[float, float]:
    means = ClusteredMeans(values[:, None], list(range(len(values))) if clusters is None else clusters)
    low, high = percentile_interval(means.resampled())
    return low[0], high[0]


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(0).uniform(size=200)
    assert interval(values) == interval(values)


def test_independent_samples_give_the_normal_interval() -> None:
    values = np.random.default_rng(1).uniform(size=400)
    low, high = interval(values)
    margin = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - margin, abs=margin / 10)
    assert high == pytest.approx(values.mean() + margin, abs=margin / 10)


def test_95_percent_of_intervals_cover_the_true_mean() -> None:
    random = np.random.default_rng(2)
    num_covered = 0
    for _ in range(100):
        low, high = interval((random.uniform(size=100) < 0.3).astype(float))
        num_covered += low <= 0.3 <= high
    assert 90 <= num_covered <= 99


def test_repeated_questions_about_a_video_do_not_narrow_the_interval() -> None:
    values = np.random.default_rng(3).uniform(size=100)
    once = interval(values)
    clusters = [index for index in range(100) for _ in range(9)]
    assert interval(np.repeat(values, 9), clusters) == pytest.approx(once)
    unclustered = interval(np.repeat(values, 9))
    assert unclustered[1] - unclustered[0] < 0.5 * (once[1] - once[0])


def test_clusters_are_weighted_by_their_number_of_samples() -> None:
    values = np.array([[1.0], [1.0], [1.0], [0.0]])
    means = ClusteredMeans(values, ["a", "a", "a", "b"])
    assert means.mean() == pytest.approx([0.75])
    # Two draws of two clusters: both a, both b, or one each.
    assert set(np.round(means.resampled()[:, 0], 6)) == {1.0, 0.0, 0.75}


def test_categories_are_averaged_even_if_a_resample_lacks_one() -> None:
    values = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    means = ClusteredMeans(values, ["a", "b", "c", "d"], ["x", "x", "x", "y"])
    assert means.mean() == pytest.approx([0.5, (1 / 3 + 1) / 2])
    assert not np.isnan(means.resampled()).any()  # some resamples hold no sample of category y


def test_weighted_means_match_a_plain_loop() -> None:
    random = np.random.default_rng(4)
    clusters = random.integers(0, 12, 60)
    categories = random.integers(0, 3, 60)
    values = random.uniform(size=(60, 2))
    means = ClusteredMeans(values, clusters.tolist(), categories.tolist())
    weights = random.multinomial(means.num_clusters, np.full(means.num_clusters, 1 / means.num_clusters), 5)
    order = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters.tolist()))}
    for row, expected in zip(weights, means._weighted(weights), strict=True):
        repeats = np.array([row[order[cluster]] for cluster in clusters.tolist()])
        drawn, kinds = np.repeat(values, repeats, axis=0), np.repeat(categories, repeats)
        assert expected == pytest.approx(np.mean([drawn[kinds == kind].mean(axis=0) for kind in set(kinds)], axis=0))
