"""The benchmarks by name, and which samples of a manifest belong to each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import task_names
from megatron_vcr1.types import Sample


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A benchmark: samples of one task, and how their metrics are averaged.

    Attributes:
        task: name of the task, which defines the metrics.
        description: its metrics, for help texts.
        format: format of the published annotations (`vcr1 data import`). None if there are none: any manifest of the
            task can be used.
        mean_of_categories: whether the authors average the metrics of the categories instead of those of the samples.
        category: prefix of the categories that belong to the benchmark; empty for all.
    """

    name: str
    task: str
    description: str
    format: str | None = None
    mean_of_categories: bool = False
    category: str = ""

    def select(self, samples: Sequence[Sample], where: object) -> list[Sample]:
        """Return the samples that belong to the benchmark.

        Args:
            samples: all samples of a file.
            where: the file, for the error message.

        Raises:
            UserError: no sample belongs to it.
        """
        chosen = [
            sample for sample in samples if sample.task == self.task and sample.category.startswith(self.category)
        ]
        if not chosen:
            kind = f"{self.task} samples" + (f" of category {self.category}..." if self.category else "")
            raise UserError(f"{where}: none of its {len(samples)} samples is for benchmark {self.name}, of {kind}")
        return chosen


_PUBLISHED = (
    Benchmark("charades_sta", "temporal_grounding", "mIoU, R@0.3, R@0.5, R@0.7", "charades_sta"),
    Benchmark("activitynet", "temporal_grounding", "mIoU, R@0.3, R@0.5, R@0.7", "activitynet"),
    Benchmark("qvhighlights", "temporal_grounding", "R@0.5, R@0.7 of the first span; mIoU of all", "qvhighlights"),
    Benchmark("nextgqa", "grounded_qa", "mIoU, accuracy; the authors' Acc@GQA, IoP, IoU", "nextgqa"),
    Benchmark("got10k", "tracking", "overlap, R@0.5, R@0.7; the toolkit's AO, SR", "got10k"),
    Benchmark("videomme", "multiple_choice_qa", "accuracy", "videomme"),
    Benchmark("videomme_short", "multiple_choice_qa", "accuracy on short videos", "videomme", category="short/"),
    Benchmark("mvbench", "multiple_choice_qa", "accuracy, mean of the 20 tasks", "mvbench", mean_of_categories=True),
    Benchmark("perception_test", "multiple_choice_qa", "accuracy", "perception_test"),
    Benchmark("vidtab", "quality", "accuracy", "vidtab_quality"),
    Benchmark(
        "dream1k", "captioning", "AutoDQ's F1, recall, precision, by a judge", "dream1k", mean_of_categories=True
    ),
)
BENCHMARKS = {benchmark.name: benchmark for benchmark in _PUBLISHED}
"""The published benchmarks by name. The name of a task is a benchmark, too: see `find_benchmark`."""


def find_benchmark(name: str) -> Benchmark:
    """Return the published benchmark of a name, or the benchmark that consists of the samples of a task.

    Raises:
        UserError: there is no such benchmark and no such task.
    """
    if name in BENCHMARKS:
        return BENCHMARKS[name]
    if name in task_names():
        return Benchmark(name, name, f"the {name} samples of any manifest")
    raise UserError(f"{name}: no such benchmark; there are {', '.join((*BENCHMARKS, *task_names()))}")
