"""The benchmarks by name, and which samples of a manifest each one is about."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation import metrics
from megatron_vcr1.evaluation.metrics import Measured
from megatron_vcr1.types import Task, VideoSample

Measure = Callable[[VideoSample, str], Measured]

_MEASURES: dict[Task, Measure | None] = {
    Task.TEMPORAL_GROUNDING: metrics.grounding,
    Task.TRACKING: metrics.tracking,
    Task.GROUNDED_QA: metrics.grounded_choice,
    Task.MULTIPLE_CHOICE_QA: metrics.choice,
    Task.QUALITY: metrics.quality,
    Task.CAPTIONING: None,
}


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark.

    Attributes:
        format: of the published annotations (`vcr1 data import`); None: there are none, any manifest of the task does.
        mean_of_categories: whether its authors average the categories' figures instead of the samples'.
        category: only samples whose category begins so.
    """

    name: str
    task: Task
    description: str
    format: str | None = None
    mean_of_categories: bool = False
    category: str = ""

    @property
    def measure(self) -> Measure | None:
        """What an output is worth; None where a judge has to read it."""
        return _MEASURES[self.task]

    def select(self, samples: Sequence[VideoSample], where: object) -> list[VideoSample]:
        """The samples that it is about.

        Raises:
            UserError: there are none; `where` names their file.
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
    """Raises UserError for a name that is none."""
    if name not in BENCHMARKS:
        raise UserError(f"{name}: no such benchmark; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
