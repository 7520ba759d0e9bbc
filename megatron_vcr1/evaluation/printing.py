"""Prints the results of benchmarks to the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megatron_vcr1.evaluation.benchmark_result import BenchmarkResult

_COUNTS = {
    "num_unanswered": "unanswered",
    "num_extra": "for other samples, left out",
    "num_lenient": "only read by the lenient reading",
    "num_untagged": "untagged",
    "num_truncated": "truncated",
    "num_reduced": "for a video that was made smaller to fit into data.max_prompt_tokens",
}


def print_result(result: BenchmarkResult) -> None:
    """Print the metrics as a table, and below it the judge, the reasons for zeros and counts of unusual outputs."""
    summary = result.summary
    table = Table("metric", "%", "95 % interval", title=f"{result.benchmark.name}: {summary.num_samples} samples")
    for name, estimate in summary.metrics.items():
        low, high = estimate.low, estimate.high
        interval = "" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}"
        table.add_row(name, f"{100 * estimate.value:.1f}", interval)
    console = Console()
    if summary.metrics:
        console.print(table)
    # markup=False: names and reasons may hold square brackets.
    if result.judge is not None:
        console.print(f"judge: {result.judge}; {summary.num_unjudged} captions not judged", markup=False)
    for part, reasons in summary.zeros.items():
        counted = ", ".join(f"{number} {reason}" for reason, number in reasons.items())
        console.print(f"{part} 0: {counted}", markup=False)
    details = result.as_json()
    counts = [f"{details[name]} {text}" for name, text in _COUNTS.items() if details[name]]
    if counts:
        console.print(f"outputs: {', '.join(counts)}")
