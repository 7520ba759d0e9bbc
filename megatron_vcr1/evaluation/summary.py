"""From what each output is worth to a benchmark's figures: means, intervals, categories, counted reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vcr1.evaluation.benchmarks import Benchmark
from megatron_vcr1.evaluation.bootstrap import ClusteredMeans, percentile_interval
from megatron_vcr1.evaluation.metrics import Measured
from megatron_vcr1.types import VideoSample

F1 = "F1"


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95 % bootstrap interval; no interval where a single video leaves nothing to resample."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """A benchmark's figures.

    Attributes:
        metrics: by name.
        categories: the same by category, without intervals, beside the category's num_samples. A category a/b also
            counts in a.
        zeros: counts by part and reason of what was worth nothing.
        num_unjudged: outputs that a judge could not judge; they are in no figure.
    """

    metrics: Mapping[str, Estimate]
    categories: Mapping[str, Mapping[str, float]]
    zeros: Mapping[str, Mapping[str, int]]
    num_samples: int
    num_unjudged: int

    def as_json(self) -> dict[str, Any]:
        metrics = {name: {"value": one.value, "low": one.low, "high": one.high} for name, one in self.metrics.items()}
        return {
            "num_samples": self.num_samples,
            "num_unjudged": self.num_unjudged,
            "metrics": metrics,
            "categories": {name: dict(figures) for name, figures in self.categories.items()},
            "zeros": {part: dict(reasons) for part, reasons in self.zeros.items()},
        }


def summarize(benchmark: Benchmark, samples: Sequence[VideoSample], measured: Sequence[Measured]) -> Summary:
    """The figures of all samples; no metrics if none could be judged.

    Args:
        measured: of each sample.
    """
    judged = [(sample, one) for sample, one in zip(samples, measured, strict=True) if one.values]
    return Summary(
        metrics=_estimates(benchmark, judged) if judged else {},
        categories=_by_category(judged),
        zeros=_count_reasons([one for _, one in judged]),
        num_samples=len(samples),
        num_unjudged=len(samples) - len(judged),
    )


def _estimates(benchmark: Benchmark, judged: Sequence[tuple[VideoSample, Measured]]) -> dict[str, Estimate]:
    names, values = _matrix(judged)
    categories = [sample.category for sample, _ in judged] if benchmark.mean_of_categories else None
    means = ClusteredMeans(values, [sample.video for sample, _ in judged], categories)
    figures = _with_f1(names, means.mean())
    if means.num_clusters == 1:
        return {name: Estimate(float(value), None, None) for name, value in figures.items()}
    resampled = _with_f1(names, means.resampled())
    bounds = {name: percentile_interval(draws) for name, draws in resampled.items()}
    return {
        name: Estimate(float(value), float(bounds[name][0]), float(bounds[name][1])) for name, value in figures.items()
    }


def _with_f1(names: Sequence[str], means: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Means [..., num_metrics] by name; F1 is of the mean recall and precision, as AutoDQ has it, not a mean of F1s."""
    by_name = dict(zip(names, np.moveaxis(means, -1, 0), strict=True))
    if not {"recall", "precision"} <= by_name.keys():
        return by_name
    both = by_name["recall"] + by_name["precision"]
    product = 2 * by_name["recall"] * by_name["precision"]
    return {F1: np.divide(product, both, out=np.zeros_like(both), where=both > 0), **by_name}


def _by_category(judged: Sequence[tuple[VideoSample, Measured]]) -> dict[str, dict[str, float]]:
    groups: dict[str, list[tuple[VideoSample, Measured]]] = {}
    for sample, one in judged:
        parts = sample.category.split("/")
        for depth in range(1, len(parts) + 1):
            groups.setdefault("/".join(parts[:depth]), []).append((sample, one))
    groups = {name: group for name, group in sorted(groups.items()) if name and len(group) < len(judged)}
    figures = {}
    for name, group in groups.items():
        names, values = _matrix(group)
        means = {metric: float(value) for metric, value in _with_f1(names, values.mean(axis=0)).items()}
        figures[name] = {"num_samples": len(group), **means}
    return figures


def _matrix(judged: Sequence[tuple[VideoSample, Measured]]) -> tuple[list[str], NDArray[np.float64]]:
    names = list(judged[0][1].values)
    return names, np.array([[one.values[name] for name in names] for _, one in judged], dtype=np.float64)


def _count_reasons(measured: Sequence[Measured]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for one in measured:
        for part, reason in one.reasons.items():
            counts.setdefault(part, Counter())[reason] += 1
    return {part: dict(counter.most_common()) for part, counter in sorted(counts.items())}
