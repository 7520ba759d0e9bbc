"""Summarizes the metrics of all samples: means, confidence intervals, categories, and counts of reasons for zeros."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vcr1.evaluation.benchmarks import Benchmark
from megatron_vcr1.evaluation.bootstrap import ClusteredMeans, percentile_interval
from megatron_vcr1.tasks import SampleMetrics
from megatron_vcr1.types import Sample

F1 = "F1"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric and the bounds of its 95 % bootstrap interval, which are None if all samples are of the same video."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """The metrics of a benchmark.

    Attributes:
        metrics: estimates by metric name.
        categories: for each category, its metrics without intervals and its num_samples. A category a/b also counts in
            category a.
        zeros: for each part of the answer, the number of zeros by reason.
        num_samples: number of all samples.
        num_unjudged: number of outputs that a judge could not judge; no metric includes them.
    """

    metrics: Mapping[str, Estimate]
    categories: Mapping[str, Mapping[str, float]]
    zeros: Mapping[str, Mapping[str, int]]
    num_samples: int
    num_unjudged: int

    def as_json(self) -> dict[str, Any]:
        """Return the summary as metrics.json holds it."""
        metrics = {
            name: {"value": estimate.value, "low": estimate.low, "high": estimate.high}
            for name, estimate in self.metrics.items()
        }
        return {
            "num_samples": self.num_samples,
            "num_unjudged": self.num_unjudged,
            "metrics": metrics,
            "categories": {name: dict(values) for name, values in self.categories.items()},
            "zeros": {part: dict(reasons) for part, reasons in self.zeros.items()},
        }


def summarize(benchmark: Benchmark, samples: Sequence[Sample], metrics: Sequence[SampleMetrics]) -> Summary:
    """Summarize the metrics of all samples; without any judged sample, the summary has no metrics.

    Args:
        benchmark: decides between the mean of samples and the mean of categories.
        samples: the samples of the benchmark.
        metrics: the metrics of each sample.
    """
    judged = [(sample, values) for sample, values in zip(samples, metrics, strict=True) if values.values]
    return Summary(
        metrics=_estimates(benchmark, judged) if judged else {},
        categories=_by_category(judged),
        zeros=_count_reasons([values for _, values in judged]),
        num_samples=len(samples),
        num_unjudged=len(samples) - len(judged),
    )


def _estimates(benchmark: Benchmark, judged: Sequence[tuple[Sample, SampleMetrics]]) -> dict[str, Estimate]:
    names, values = _matrix(judged)
    categories = [sample.category for sample, _ in judged] if benchmark.mean_of_categories else None
    means = ClusteredMeans(values, [_cluster(sample) for sample, _ in judged], categories)
    by_name = _with_f1(names, means.mean())
    if means.num_clusters == 1:
        return {name: Estimate(float(value), None, None) for name, value in by_name.items()}
    resampled = _with_f1(names, means.resampled())
    bounds = {name: percentile_interval(draws) for name, draws in resampled.items()}
    return {
        name: Estimate(float(value), float(bounds[name][0]), float(bounds[name][1])) for name, value in by_name.items()
    }


def _cluster(sample: Sample) -> Hashable:
    """Return what samples with the same videos and images have in common; a sample of text alone is by itself."""
    return tuple(medium.path for medium in sample.media) or sample.id


def _with_f1(names: Sequence[str], means: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Return means [..., num_metrics] by name.

    F1 is computed from mean recall and mean precision, as in AutoDQ; it is not the mean of the samples' F1.
    """
    by_name = dict(zip(names, np.moveaxis(means, -1, 0), strict=True))
    with_f1 = {}
    for name, mean in by_name.items():
        reading = name.removeprefix("recall")  # "" or " (lenient)"
        if name == f"recall{reading}" and (precision := by_name.get(f"precision{reading}")) is not None:
            both = mean + precision
            with_f1[F1 + reading] = np.divide(2 * mean * precision, both, out=np.zeros_like(both), where=both > 0)
        with_f1[name] = mean
    return with_f1


def _by_category(judged: Sequence[tuple[Sample, SampleMetrics]]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[tuple[Sample, SampleMetrics]]] = {}
    for sample, values in judged:
        parts = sample.category.split("/")
        for depth in range(1, len(parts) + 1):
            groups.setdefault("/".join(parts[:depth]), []).append((sample, values))
    # A category that holds all samples would repeat the metrics of the benchmark.
    groups = {name: group for name, group in sorted(groups.items()) if name and len(group) < len(judged)}
    categories = {}
    for name, group in groups.items():
        names, matrix = _matrix(group)
        means = {metric: float(value) for metric, value in _with_f1(names, matrix.mean(axis=0)).items()}
        categories[name] = {"num_samples": len(group), **means}
    return categories


def _matrix(judged: Sequence[tuple[Sample, SampleMetrics]]) -> tuple[list[str], NDArray[np.float64]]:
    """Return the names of the metrics and their values [num_samples, num_metrics]."""
    names = list(judged[0][1].values)
    rows = [[metrics.values[name] for name in names] for _, metrics in judged]
    return names, np.array(rows, dtype=np.float64)


def _count_reasons(metrics: Sequence[SampleMetrics]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for values in metrics:
        for part, reason in values.reasons.items():
            counts.setdefault(part, Counter())[reason] += 1
    return {part: dict(counter.most_common()) for part, counter in sorted(counts.items())}
