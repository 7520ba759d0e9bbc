"""The six tables of the VideoChat-R1 paper: their columns, the runs that belong to them, and the published numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

THINK, ANSWER, GLUE = "think", "answer", "glue"

Prompt = tuple[str, ...]
"""The parts of a response that a prompt asks for: THINK, ANSWER and GLUE, in this order."""


@dataclass(frozen=True, slots=True)
class Training:
    """How a model was trained, as far as the tables distinguish models.

    Attributes:
        stage: "grpo" or "sft".
        tasks: the tasks of its manifests; empty if they are not known.
        thinking: whether its prompts asked for reasoning; None if only some did.
        num_epochs: number of epochs; None if the number of steps was set instead.
        base: absolute path of the model that it started from; empty if it is not known.
    """

    stage: str
    tasks: frozenset[str]
    thinking: bool | None
    num_epochs: float | None
    base: str

    @property
    def prompt(self) -> Prompt:
        """The parts of a response that the training prompts asked for."""
        parts = {THINK: self.thinking is not False, ANSWER: True, GLUE: "grounded_qa" in self.tasks}
        return tuple(part for part, is_asked in parts.items() if is_asked)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: a metric of a benchmark.

    Attributes:
        group: the title above the columns of a benchmark.
        title: the title of the column.
        benchmarks: names or labels of the benchmarks whose results it shows.
        metric: the name of the metric in a result.
    """

    group: str
    title: str
    benchmarks: tuple[str, ...]
    metric: str


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """A row of the paper, with its numbers as printed ("-" and "N/A" included), in the order of the columns."""

    method: str
    epochs: str
    training_prompt: Prompt
    test_prompt: Prompt
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PaperTable:
    """A table of the paper.

    Attributes:
        number: the table's number.
        title: what it shows.
        columns: its columns in the paper's order.
        rows: the rows of models that the paper trains, and of their baselines.
        accepts: whether a trained model is one that this table compares.
        shows_epochs: whether it has a column for the number of epochs.
        separates_glue: whether prompts with and without glue have rows of their own. In the other tables, only grounded
            QA is asked with glue.
    """

    number: int
    title: str
    columns: tuple[Column, ...]
    rows: tuple[PublishedRow, ...]
    accepts: Callable[[Training], bool]
    shows_epochs: bool = False
    separates_glue: bool = False


def _columns(group: str, benchmarks: str, **titles: str) -> tuple[Column, ...]:
    return tuple(Column(group, title, tuple(benchmarks.split()), _METRICS[key]) for key, title in titles.items())


def _prompt(letters: str) -> Prompt:
    return tuple(part for part in (THINK, ANSWER, GLUE) if part[0].upper() in letters)


def _row(method: str, epochs: str, training: str, test: str, values: str) -> PublishedRow:
    """Build a row. Prompts are written as the first letters of their parts, as TA for reasoning and answer."""
    numbers = tuple(value for value in values.split() if value != "|")
    return PublishedRow(method, epochs, _prompt(training), _prompt(test), numbers)


_METRICS = {
    "miou": "mIoU",
    "r3": "R@0.3",
    "r5": "R@0.5",
    "r7": "R@0.7",
    "overlap": "overlap",
    "accuracy": "accuracy",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
}
_SPANS = {"miou": "mIoU", "r5": "R@0.5", "r7": "R@0.7"}
_ALL_SPANS = {"miou": "mIoU", "r3": "R@0.3", "r5": "R@0.5", "r7": "R@0.7"}
_VIDEO_MME = _columns("VideoMME", "videomme_short", accuracy="Short-Avg")
_PERCEPTION = (
    *_columns("Charades-STA", "charades_sta", **_SPANS),
    *_columns("ActivityNet", "activitynet", **_SPANS),
    *_columns("NExTGQA", "nextgqa", miou="mIoU", accuracy="acc"),
    *_columns("GoT", "got10k", overlap="Overlap", r5="R@0.5"),
    *_VIDEO_MME,
)
_GROUNDING, _TRACKING, _GROUNDED_QA, _CHOICE = "temporal_grounding", "tracking", "grounded_qa", "multiple_choice_qa"
_JOINT = {_GROUNDING, _TRACKING, _GROUNDED_QA}

TABLES = (
    PaperTable(
        1,
        "Results on various video benchmarks",
        (
            *_PERCEPTION,
            *_columns("MVBench", "mvbench", accuracy="Avg"),
            *_columns("Perception Test", "perception_test", accuracy="Val"),
        ),
        (
            _row(
                "Qwen2.5-VL-7B (baseline)",
                "",
                "",
                "A",
                "29.0 24.2 11.1 | 21.1 15.8 7.5 | 15.4 59.5 | 12.6 1.1 | 71.3 | 66.9 | 69.1",
            ),
            _row("SFT w/ Charades-STA", "1", "A", "A", "46.3 45.0 25.3 | 20.6 16.7 7.9 | - - | - - | N/A | N/A | N/A"),
            _row("SFT w/ GoT", "1", "A", "A", "- - - | - - - | - - | 41.8 29.5 | 59.2 | 58.6 | 58.5"),
            _row("SFT w/ NExTGQA", "1", "AG", "A", "- - - | - - - | 28.2 64.8 | - - | 60.1 | 59.2 | 60.7"),
            _row(
                "VideoChat-R1",
                "1",
                "AG",
                "A",
                "60.8 71.7 50.2 | 36.6 33.4 17.7 | 32.4 70.6 | 43.8 38.2 | 72.2 | 67.9 | 70.0",
            ),
            _row(
                "VideoChat-R1-thinking",
                "1",
                "TAG",
                "TA",
                "59.9 70.6 47.2 | 35.5 33.3 16.7 | 36.1 69.2 | 43.3 33.9 | 74.2 | 66.2 | 69.6",
            ),
        ),
        accepts=lambda run: (
            (run.stage == "sft" and len(run.tasks) == 1 and run.tasks < _JOINT)
            or (run.stage == "grpo" and run.tasks == _JOINT)
        ),
    ),
    PaperTable(
        2,
        "Temporal grounding",
        (
            *_columns("Charades-STA (in domain)", "charades_sta", **_ALL_SPANS),
            *_columns("ActivityNet (out of domain)", "activitynet", **_ALL_SPANS),
            *_VIDEO_MME,
        ),
        (
            _row("Qwen2.5-VL-7B (baseline)", "", "", "A", "29.0 44.7 24.2 11.1 | 21.1 28.3 15.8 7.4 | 71.3"),
            _row("SFT", "1", "A", "A", "46.3 63.9 45.0 25.3 | 20.6 30.2 16.7 7.9 | N/A"),
            _row("SFT", "3", "A", "A", "34.6 51.7 36.3 20.6 | 17.3 26.1 10.0 3.9 | N/A"),
            _row("GRPO", "1", "A", "A", "58.7 80.9 67.7 45.4 | 31.9 46.3 28.8 14.1 | 72.6"),
            _row("GRPO", "1", "TA", "TA", "59.3 81.7 70.4 46.0 | 30.7 45.0 27.5 12.9 | 73.6"),
            _row("GRPO", "3", "TA", "TA", "61.3 83.1 72.8 51.5 | 34.3 50.4 32.2 16.2 | 70.9"),
        ),
        accepts=lambda run: run.tasks == {_GROUNDING},
        shows_epochs=True,
    ),
    PaperTable(
        3,
        "Tracking",
        (*_columns("GoT", "got10k", overlap="Average overlap", r5="R@0.5", r7="R@0.7"), *_VIDEO_MME),
        (
            _row("Qwen2.5-VL-7B (baseline)", "", "", "A", "12.6 1.1 0 | 71.3"),
            _row("SFT", "1", "A", "A", "41.8 29.5 3.9 | 59.2"),
            _row("GRPO", "1", "A", "A", "42.5 30.6 3.9 | 71.4"),
        ),
        accepts=lambda run: run.tasks == {_TRACKING},
    ),
    PaperTable(
        4,
        "Multiple-choice QA, with and without time spans (glue)",
        (
            *_columns("NExTGQA", "nextgqa nextgqa_multiple_choice", miou="mIoU", accuracy="acc"),
            *_columns("VideoMME", "videomme_short", accuracy="acc"),
        ),
        (
            _row("Qwen2.5-VL-7B (baseline)", "", "", "A", "- 41.7 | -"),
            _row("Qwen2.5-VL-7B (baseline)", "", "", "AG", "15.4 59.5 | -"),
            _row("SFT", "1", "A", "A", "- 65.1 | -"),
            _row("SFT", "1", "AG", "AG", "28.2 64.8 | -"),
            _row("GRPO", "1", "A", "A", "- 70.1 | -"),
            _row("GRPO", "1", "A", "AG", "16.2 70.2 | -"),
            _row("GRPO", "1", "AG", "AG", "35.1 68.7 | 72.0"),
            _row("Qwen2.5-VL-7B (baseline)", "", "", "TA", "- 47.7 | -"),
            _row("Qwen2.5-VL-7B (baseline)", "", "", "TAG", "20.2 53.3 | -"),
            _row("GRPO", "1", "TA", "TA", "- 68.8 | 74.7"),
            _row("GRPO", "1", "TAG", "TAG", "32.9 66.9 | 75.3"),
        ),
        accepts=lambda run: len(run.tasks) == 1 and run.tasks <= {_GROUNDED_QA, _CHOICE},
        separates_glue=True,
    ),
    PaperTable(
        5,
        "Captioning and quality assessment",
        (
            *_columns("Dream-1k", "dream1k", f1="F1", precision="Precision", recall="Recall"),
            *_columns("VidTAB-QA", "vidtab", accuracy="Accuracy"),
        ),
        # The paper prints one line for each method; the two tasks are models of their own.
        (
            _row("Baseline (Qwen2-VL-7B)", "", "", "A", "30.6 33.8 27.9 | -"),
            _row("Baseline (Qwen2.5-VL-7B)", "", "", "A", "- - - | 70.7"),
            _row("SFT", "1", "A", "A", "31.4 32.6 30.2 | -"),
            _row("SFT", "1", "A", "A", "- - - | 71.7"),
            _row("GRPO", "1", "A", "A", "38.2 45.4 33.1 | -"),
            _row("GRPO", "1", "A", "A", "- - - | 72.6"),
        ),
        accepts=lambda run: run.tasks in ({"captioning"}, {"quality"}),
    ),
    PaperTable(
        6,
        "Joint training on spatio-temporal tasks",
        _PERCEPTION,
        (
            _row(
                "Qwen2.5-VL-7B",
                "",
                "",
                "A",
                "29.0 24.2 11.1 | 21.1 15.8 7.5 | 15.4 59.5 | 12.6 1.1 | 71.3",
            ),
            _row("GRPO w/ STA", "1", "A", "A", "59.3 70.4 46.0 | 30.7 27.5 12.9 | 31.4 61.2 | 27.8 12.9 | 72.6"),
            _row("GRPO w/ GQA", "1", "AG", "A", "36.0 33.5 15.5 | 24.9 20.6 10.7 | 35.1 68.7 | 36.1 26.7 | 72.0"),
            _row("GRPO w/ GoT", "1", "A", "A", "28.7 25.1 9.6 | 20.1 16.2 6.8 | 15.6 60.5 | 42.5 30.6 | 71.4"),
            _row("GRPO w/ STA-GQA", "1", "AG", "A", "59.8 69.7 47.0 | 33.7 31.0 16.0 | 35.7 67.7 | 36.5 28.9 | 72.2"),
            _row(
                "GRPO w/ STA-GQA-GoT", "1", "AG", "A", "60.8 71.7 50.2 | 36.6 33.4 17.7 | 32.4 70.6 | 43.8 38.2 | 72.2"
            ),
        ),
        accepts=lambda run: run.stage == "grpo" and run.thinking is False and bool(run.tasks) and run.tasks <= _JOINT,
    ),
)
