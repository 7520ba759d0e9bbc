"""Collects the evaluation metrics of all models into report.json, and prints them as tables."""

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
from megatron_vcr1.command_line import text_table

COLUMNS = {
    "base_answering": "base, no timeline",
    "base": "base",
    "sft_grounding": "SFT grounding",
    "grpo_grounding": "GRPO grounding",
    "sft_joint": "SFT joint",
    "grpo_joint": "GRPO joint",
}
"""Table columns by run. In grounding, "base" and the GRPO models write a timeline first; the others answer directly."""

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
"""Table rows: the benchmark's label and its metric, shown in percent."""

SMALL_COLUMNS = {"sft_small": "SFT", "grpo_small": "GRPO"}

Metrics = Mapping[str, Mapping[str, Sequence[float]]]
"""Metrics in percent by row and column, one value per seed."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """A bound on a metric, in percent, that the demo is expected to meet."""

    text: str
    column: str
    row: str
    at_least: float | None = None
    at_most: float | None = None

    def is_met(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


EXPECTATIONS = (
    Expectation("the base model grounds badly: at most 20", "base", "grounding, mIoU", at_most=20),
    Expectation("GRPO learns to ground: at least 45", "grpo_grounding", "grounding, mIoU", at_least=45),
    Expectation("GRPO on three tasks tracks: at least 55", "grpo_joint", "tracking, overlap", at_least=55),
    Expectation("GRPO on three tasks answers: at least 85", "grpo_joint", "grounded QA, accuracy", at_least=85),
)


def read_metrics(
    demo: Demo, columns: Iterable[str], seeds: Iterable[int], rows: Mapping[str, tuple[str, str]]
) -> dict[str, dict[str, list[float]]]:
    """Read the metrics of the evaluated models by row and column, one value per seed."""
    return {
        row: {column: [_metric(demo, column, seed, label, metric) for seed in seeds] for column in columns}
        for row, (label, metric) in rows.items()
    }


def _metric(demo: Demo, column: str, seed: int, label: str, metric: str) -> float:
    name = column.removesuffix("_answering")
    thinks = label.startswith("temporal_grounding") and column == name and "test_thinking" in TESTS[name]
    label = f"{label}_thinking" if thinks else label
    run_dir = demo.run_dir(name, seed)
    result = json.loads((run_dir / "evaluation" / label / "metrics.json").read_text(encoding="utf-8"))
    return 100 * float(result["metrics"][metric]["value"])


def table(title: str, metrics: Metrics, columns: Mapping[str, str]) -> Table:
    """Build a table of means with the values of the seeds in brackets; the best mean of a row is bold."""
    rows = []
    for row, cells in metrics.items():
        means = {column: fmean(cells[column]) for column in columns}
        best = max(means.values())
        texts = [row]
        for column, mean in means.items():
            text = f"[bold]{mean:.1f}[/]" if mean == best else f"{mean:.1f}"
            seeds = " ".join(f"{value:.0f}" for value in cells[column])
            texts.append(f"{text} [dim]({seeds})[/]" if len(cells[column]) > 1 else text)
        rows.append(texts)
    heads = ["\n".join(name.rsplit(" ", 1)) for name in columns.values()]
    return text_table(title, ("", *heads), rows, wrap=True)


def findings(metrics: Metrics, small: Metrics) -> list[str]:
    """State which expectations are met and which of the paper's findings are reproduced, with the numbers."""

    def mean(row: str, column: str) -> float:
        return fmean((small if column in SMALL_COLUMNS else metrics)[row][column])

    def claim(text: str, ours: str, other: str, rows: Iterable[str]) -> str:
        pairs = {row: (mean(row, ours), mean(row, other)) for row in rows}
        numbers = "; ".join(f"{row} {a:.1f} vs {b:.1f} ({a - b:+.1f})" for row, (a, b) in pairs.items())
        return f"{verdict([a - b for a, b in pairs.values()])}: {text} ({numbers})"

    grounding = ("grounding, mIoU", "unseen pairs: grounding, mIoU", "longer events: grounding, mIoU")
    others = ("tracking, overlap", "grounded QA, accuracy")
    forgetting = "after training on grounding alone, GRPO retains more of the other tasks than SFT"
    base = ", ".join(f"{mean(row, 'base'):.1f}" for row in others)
    return [
        *(
            f"{'met' if expected.is_met(mean(expected.row, expected.column)) else 'NOT met'}: {expected.text} "
            f"({expected.row}: {mean(expected.row, expected.column):.1f})"
            for expected in EXPECTATIONS
        ),
        claim("GRPO on three tasks grounds better than on one", "grpo_joint", "grpo_grounding", grounding),
        claim("GRPO grounds better than SFT with all labels", "grpo_grounding", "sft_grounding", grounding),
        claim("GRPO grounds better than SFT with few labels", "grpo_small", "sft_small", grounding),
        claim("GRPO is better than SFT on three tasks", "grpo_joint", "sft_joint", (grounding[0], *others)),
        claim(f"{forgetting}; base model: {base}", "grpo_grounding", "sft_grounding", others),
        "In grounding, the GRPO models write a timeline before they answer and the SFT models answer directly, as in "
        "the paper. Differences of a few points can be chance",
    ]


def verdict(differences: Sequence[float]) -> str:
    """Return whether a finding is reproduced on all rows, on some rows or on none."""
    if min(differences) > 0:
        return "reproduced"
    return "partly reproduced" if max(differences) > 0 else "NOT reproduced"


def collect(
    demo: Demo, spent: Mapping[str, Mapping[str, float]], call_seconds: Sequence[float], num_workers: int
) -> dict[str, Any]:
    """Return the content of report.json: metrics, findings, and the time of all calls and of each job."""
    metrics = read_metrics(demo, COLUMNS, demo.seeds, ROWS)
    small = read_metrics(demo, SMALL_COLUMNS, demo.small_seeds(), GROUNDING)
    verified = [json.loads(path.read_text()) for path in sorted((demo.out / "verified").glob("*.json"))]
    return {
        "date": f"{datetime.now():%Y-%m-%d}",
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}",
        "seeds": list(demo.seeds),
        "metrics": metrics,
        "small_labels": {"num_labels": demo.sizes.small, "num_seeds": len(demo.small_seeds()), "metrics": small},
        "num_test_videos": demo.sizes.test,
        "findings": findings(metrics, small),
        "export_in_transformers": verified,
        "wall_s": round(sum(call_seconds), 1),
        "num_calls": len(call_seconds),
        "cpu_s": round(sum(times["cpu_s"] for times in spent.values()), 1),
        "num_workers": num_workers,
        "jobs": spent,
    }


def print_results(results: Mapping[str, Any], console: Console) -> None:
    """Print the tables and findings of a report.json."""
    seeds = ", ".join(map(str, results["seeds"]))
    title = f"{results['date']}, {results['machine']}; percent, mean of seeds {seeds} (each seed)"
    console.print(table(title, results["metrics"], COLUMNS), "")
    small = results["small_labels"]
    title = f"Grounding with {small['num_labels']} labels, mean of {small['num_seeds']} seeds"
    console.print(table(title, small["metrics"], SMALL_COLUMNS), "")
    # The sentences are rebuilt from the metrics, so that an older report.json is shown in the current words.
    for sentence in findings(results["metrics"], small["metrics"]):
        console.print(f"- {sentence}", highlight=False)
    for verified in results["export_in_transformers"]:
        equal, total = verified["num_equal"], verified["num_answers"]
        console.print(f"- export: {equal} of {total} answers of transformers are identical", highlight=False)
    calls = f"{results['num_calls']} calls, " if results.get("num_calls", 1) > 1 else ""
    console.print(
        f"{results['wall_s']:.0f} s in {calls}{results['num_workers']} single-threaded processes, "
        f"{results['cpu_s']:.0f} CPU seconds",
        highlight=False,
    )
