"""From the evaluations of all models to the tables that the demo prints, and report.json."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from demo.plan import TESTS, Demo

COLUMNS = {
    "base_answering": "base, at once",
    "base": "base",
    "sft_grounding": "SFT grounding",
    "grpo_grounding": "GRPO grounding",
    "sft_joint": "SFT joint",
    "grpo_joint": "GRPO joint",
}
"""Models by their runs. In grounding the base and GRPO's draw a time line first; the others answer at once."""

GROUNDING = {
    "grounding, mIoU": ("temporal_grounding", "mIoU"),
    "grounding, R@0.5": ("temporal_grounding", "R@0.5"),
    "unseen pairs: grounding, mIoU": ("temporal_grounding_unseen_pairs", "mIoU"),
    "longer events: grounding, mIoU": ("temporal_grounding_longer_events", "mIoU"),
}
ROWS = GROUNDING | {
    "tracking, overlap": ("tracking", "overlap"),
    "unseen pairs: tracking, overlap": ("tracking_unseen_pairs", "overlap"),
    "grounded QA, accuracy": ("grounded_qa", "accuracy"),
    "unseen pairs: grounded QA, accuracy": ("grounded_qa_unseen_pairs", "accuracy"),
    "grounded QA, mIoU": ("grounded_qa", "mIoU"),
    "longer events: grounded QA, mIoU": ("grounded_qa_longer_events", "mIoU"),
}
"""What is shown: the label of a test and its metric; all in percent."""

SMALL_COLUMNS = {"sft_small": "SFT", "grpo_small": "GRPO"}


@dataclass(frozen=True, slots=True)
class Promise:
    """A figure that the demo is to reach."""

    text: str
    column: str
    row: str
    least: float | None = None
    most: float | None = None

    def is_kept(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)


PROMISES = (
    Promise("the base model finds moments badly: at most 20", "base", "grounding, mIoU", most=20),
    Promise("GRPO finds them: at least 45", "grpo_grounding", "grounding, mIoU", least=45),
    Promise("GRPO on three tasks tracks: at least 55", "grpo_joint", "tracking, overlap", least=55),
    Promise("and answers with the moment: at least 85", "grpo_joint", "grounded QA, accuracy", least=85),
)


Figures = Mapping[str, Mapping[str, Sequence[float]]]
"""Row to column to the percentages of the seeds, in their order."""


def read_figures(
    demo: Demo, columns: Iterable[str], seeds: Iterable[int], rows: Mapping[str, tuple[str, str]]
) -> dict[str, dict[str, list[float]]]:
    """The figures of models that were tested."""
    return {
        row: {column: [_figure(demo, column, seed, label, metric) for seed in seeds] for column in columns}
        for row, (label, metric) in rows.items()
    }


def _figure(demo: Demo, column: str, seed: int, label: str, metric: str) -> float:
    name = column.removesuffix("_answering")
    thinks = label.startswith("temporal_grounding") and column == name and "test_thinking" in TESTS[name]
    label = f"{label}_thinking" if thinks else label
    run_dir = demo.run_dir(name, seed)
    result = json.loads((run_dir / "evaluation" / label / "metrics.json").read_text(encoding="utf-8"))
    return 100 * float(result["metrics"][metric]["value"])


def table(title: str, figures: Figures, columns: Mapping[str, str]) -> Table:
    """Means of the seeds, and the seeds; the best of a row in bold."""
    result = Table(title=title, title_justify="left", title_style="bold")
    result.add_column("", no_wrap=True)
    for name in columns.values():
        result.add_column(name, justify="right")
    for row, cells in figures.items():
        means = {column: fmean(cells[column]) for column in columns}
        best = max(means.values())
        texts = []
        for column, mean in means.items():
            shown = f"[bold]{mean:.1f}[/]" if mean == best else f"{mean:.1f}"
            seeds = " ".join(f"{value:.0f}" for value in cells[column])
            texts.append(f"{shown} [dim]({seeds})[/]" if len(cells[column]) > 1 else shown)
        result.add_row(row, *texts)
    return result


def findings(figures: Figures, small: Figures) -> list[str]:
    """Which promises are kept, and which of the paper's findings are seen here, in sentences with numbers."""

    def mean(row: str, column: str) -> float:
        return fmean((small if column in SMALL_COLUMNS else figures)[row][column])

    def claim(text: str, ours: str, other: str, rows: Iterable[str]) -> str:
        pairs = {row: (mean(row, ours), mean(row, other)) for row in rows}
        shown = "; ".join(f"{row} {a:.1f} against {b:.1f} ({a - b:+.1f})" for row, (a, b) in pairs.items())
        return f"{verdict([a - b for a, b in pairs.values()])}: {text} ({shown})"

    grounding = ("grounding, mIoU", "unseen pairs: grounding, mIoU", "longer events: grounding, mIoU")
    others = ("tracking, overlap", "grounded QA, accuracy")
    alone = "trained on grounding alone, GRPO keeps more of the other tasks than SFT"
    base = ", ".join(f"{mean(row, 'base'):.1f}" for row in others)
    return [
        *(
            f"{'reached' if promise.is_kept(mean(promise.row, promise.column)) else 'NOT reached'}: {promise.text} "
            f"({promise.row}: {mean(promise.row, promise.column):.1f})"
            for promise in PROMISES
        ),
        claim("GRPO on three tasks grounds better than on one", "grpo_joint", "grpo_grounding", grounding),
        claim("GRPO grounds better than SFT, all labels", "grpo_grounding", "sft_grounding", grounding),
        claim("GRPO grounds better than SFT, few labels", "grpo_small", "sft_small", grounding),
        claim("GRPO is better than SFT on three tasks", "grpo_joint", "sft_joint", (grounding[0], *others)),
        claim(f"{alone}; the base has {base}", "grpo_grounding", "sft_grounding", others),
        "In grounding GRPO's models draw a time line before they answer and SFT's answer at once, as in the paper; "
        "differences of a few points can be chance",
    ]


def verdict(differences: Sequence[float]) -> str:
    """Whether something is ahead everywhere, somewhere or nowhere."""
    if min(differences) > 0:
        return "seen"
    return "seen in part" if max(differences) > 0 else "NOT seen"


def collect(
    demo: Demo, spent: Mapping[str, Mapping[str, float]], calls: Sequence[float], num_workers: int
) -> dict[str, Any]:
    """What report.json holds: figures, findings, and how long it all took, in one call or in several, and which job."""
    figures = read_figures(demo, COLUMNS, demo.seeds, ROWS)
    small = read_figures(demo, SMALL_COLUMNS, demo.small_seeds(), GROUNDING)
    verified = [json.loads(path.read_text()) for path in sorted((demo.out / "verified").glob("*.json"))]
    return {
        "date": f"{datetime.now():%Y-%m-%d}",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}",
        "seeds": list(demo.seeds),
        "figures": figures,
        "small_labels": {"num_labels": demo.sizes.small, "num_seeds": len(demo.small_seeds()), "figures": small},
        "num_test_videos": demo.sizes.test,
        "findings": findings(figures, small),
        "export_in_transformers": verified,
        "wall_s": round(sum(calls), 1),
        "num_calls": len(calls),
        "cpu_s": round(sum(one["cpu_s"] for one in spent.values()), 1),
        "num_workers": num_workers,
        "jobs": spent,
    }


def print_results(results: Mapping[str, Any], console: Console) -> None:
    """The tables and findings of a report.json."""
    seeds = ", ".join(map(str, results["seeds"]))
    title = f"{results['date']}, {results['machine']}; mean of seeds {seeds} (each), percent"
    console.print(table(title, results["figures"], COLUMNS))
    small = results["small_labels"]
    console.print(
        table(f"{small['num_labels']} labels, mean of {small['num_seeds']} seeds", small["figures"], SMALL_COLUMNS)
    )
    for sentence in results["findings"]:
        console.print(f"- {sentence}", highlight=False)
    for one in results["export_in_transformers"]:
        equal, number = one["num_equal"], one["num_answers"]
        console.print(f"- export: transformers gives {equal} of {number} answers as measured", highlight=False)
    calls = f"{results['num_calls']} calls, " if results.get("num_calls", 1) > 1 else ""
    console.print(
        f"{results['wall_s']:.0f} s in {calls}{results['num_workers']} processes of one thread, "
        f"{results['cpu_s']:.0f} CPU seconds",
        highlight=False,
    )
