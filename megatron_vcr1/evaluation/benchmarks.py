"""The benchmarks by name, and which samples of a manifest belong to each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation import metrics
from megatron_vcr1.evaluation.metrics import SampleMetrics
from megatron_vcr1.types import Task, VideoSample

MetricFunction = Callable[[VideoSample, str], SampleMetrics]

_METRIC_FUNCTIONS: dict[Task, MetricFunction | None] = {
    Task.TEMPORAL_GROUNDING: metrics.grounding,
    Task.TRACKING: metrics.tracking,
    Task.GROUNDED_QA: metrics.grounded_choice,
    Task.MULTIPLE_CHOICE_QA: metrics.choice,
    Task.QUALITY: metrics.quality,
    Task.CAPTIONING: None,
}


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark: samples of one task, and how their metrics are averaged.

    Attributes:
        description: its metrics, for help texts.
        format: format of the published annotations (`vcr1 data import`). None if there are none: any manifest of the
            task can be used.
        mean_of_categories: whether the authors average the metrics of the categories instead of those of the samples.
        category: prefix of the categories that belong to the benchmark; empty for all.
    """

    name: str
    task: Task
    description: str
    format: str | None = None
    mean_of_categories: bool = False
    category: str = ""

    @property
    def metric_function(self) -> MetricFunction | None:
        """The function that computes the metrics of a sample and an output; None if a judge has to read the outputs."""
        return _METRIC_FUNCTIONS[self.task]

    def select(self, samples: Sequence[VideoSample], where: object) -> list[VideoSample]:
        """Return the samples that belong to the benchmark.

        Args:
            samples: all samples of a file.
            where: the file, for the error message.

        Raises:
            UserError: no sample belongs to it.
        """
        chosen = [
            sample for sample in samples if sample.task is self.task and sample.category.startswith(self.category)
        ]
        if not chosen:
            kind = f"{self.task} samples" + (f" of category {self.category}..." if self.category else "")
            raise UserError(f"{where}: none of its {len(samples)} samples is for benchmark {self.name}, of {kind}")
        return chosen


_PUBLISHED = (
    Benchmark("charades_sta", Task.TEMPORAL_GROUNDING, "mIoU, R@0.3, R@0.5, R@0.7", "charades_sta"),
    Benchmark("activitynet", Task.TEMPORAL_GROUNDING, "mIoU, R@0.3, R@0.5, R@0.7", "activitynet"),
    Benchmark("nextgqa", Task.GROUNDED_QA, "mIoU, accuracy; the authors' Acc@GQA, IoP, IoU", "nextgqa"),
    Benchmark("got10k", Task.TRACKING, "overlap, R@0.5, R@0.7; the toolkit's AO, SR", "got10k"),
    Benchmark("videomme", Task.MULTIPLE_CHOICE_QA, "accuracy", "videomme"),
    Benchmark("videomme_short", Task.MULTIPLE_CHOICE_QA, "accuracy on short videos", "videomme", category="short/"),
    Benchmark("mvbench", Task.MULTIPLE_CHOICE_QA, "accuracy, mean of the 20 tasks", "mvbench", mean_of_categories=True),
    Benchmark("perception_test", Task.MULTIPLE_CHOICE_QA, "accuracy", "perception_test"),
    Benchmark("vidtab", Task.QUALITY, "accuracy", "vidtab_quality"),
    Benchmark(
        "dream1k", Task.CAPTIONING, "AutoDQ's F1, recall, precision, by a judge", "dream1k", mean_of_categories=True
    ),
)
_BY_TASK = tuple(Benchmark(str(task), task, f"the {task} samples of any manifest") for task in Task)

BENCHMARKS = {benchmark.name: benchmark for benchmark in (*_PUBLISHED, *_BY_TASK)}


def find_benchmark(name: str) -> Benchmark:
    """Return a benchmark by its name. Raises UserError for an unknown name."""
    if name not in BENCHMARKS:
        raise UserError(f"{name}: no such benchmark; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
