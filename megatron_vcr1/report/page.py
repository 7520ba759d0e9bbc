"""Renders a report: one HTML file that needs no network and runs no scripts.

Texts of models and datasets are untrusted. The templates escape them, and as a second line of defence the page's
Content-Security-Policy forbids scripts and connections.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_vcr1.data.video_process import VideoReader
from megatron_vcr1.report.charts import MAX_POINTS, short
from megatron_vcr1.report.curves import VALIDATION, curve_sections, phase_chart
from megatron_vcr1.report.gallery import Exhibit, evaluation_exhibits, rollout_exhibits, with_frames
from megatron_vcr1.report.rendering import environment, made_with, write_text
from megatron_vcr1.report.results import main_table, num_answers_and_samples, result_json, result_table
from megatron_vcr1.report.run_record import RunRecord
from megatron_vcr1.report.tables import (
    MAX_REASONS,
    key_metrics,
    phase_rows,
    settings_that_differ,
    zero_rows,
)

_MAX_SKIPPED = 50
_MAX_STARTS = 20
_HIGH_TRUNCATION = 0.05
_FEW_SAMPLES = 200
_MAX_NAMES = 3  # names of runs in the title


@dataclass(frozen=True)
class Report:
    """The notes at the top of a written page, and its size."""

    notes: Sequence[str]
    num_samples: int
    num_bytes: int


def write_report(runs: Sequence[RunRecord], out: Path, *, max_samples: int, json_path: Path | None = None) -> Report:
    """Write the page, and optionally its numbers as JSON. Each file appears only when it is complete.

    Args:
        runs: the runs; the others are compared with the first.
        out: the page.
        max_samples: maximum number of samples in the gallery, over all runs; each takes about 60 kB.
        json_path: where to write the numbers; None does not write them.
    """
    problems: dict[str, list[str]] = {run.name: [] for run in runs}
    chosen = {
        run.name: [*rollout_exhibits(run, problems[run.name]), *evaluation_exhibits(run, problems[run.name])]
        for run in runs
    }
    exhibits = list(_gallery(runs, chosen, max_samples))
    notes = [
        *_extent(runs, sum(map(len, chosen.values())), sum(len(shown) for _, shown in exhibits)),
        *_grouped([(run.name, note) for run in runs for note in _notes(run, problems[run.name])], len(runs)),
    ]
    results = result_table(runs)
    if missing := sum(1 for _, shown in exhibits for exhibit in shown if exhibit.missing):
        notes.append(f"samples of the gallery without all of their frames: {missing}; each states the reason")
    zeros = zero_rows(runs)
    context = {
        "runs": runs,
        "stages": list(dict.fromkeys(str(run.setting("train", "stage") or "run").upper() for run in runs)),
        "title": _title(runs),
        "notes": notes,
        "key_metrics": [(run, key_metrics(run)) for run in runs],
        "main_results": main_table(runs),
        "results": results,
        "sections": curve_sections(runs),
        "zeros": zeros[:MAX_REASONS],
        "num_more_zeros": max(len(zeros) - MAX_REASONS, 0),
        "phases": phase_rows(runs),
        "phase_charts": [chart for run, title in _phase_titles(runs) if (chart := phase_chart(run, title))],
        "gallery": exhibits,
        "skipped": [(run, list(run.skipped.items())) for run in runs if run.skipped],
        "max_skipped": _MAX_SKIPPED,
        "max_starts": _MAX_STARTS,
        "max_points": MAX_POINTS,
        "differing": settings_that_differ(runs) if len(runs) > 1 else {},
        "written": datetime.now().astimezone(),
        "made_with": made_with(),
    }
    num_bytes = write_text(out, environment().get_template("page.html.jinja").render(context))
    if json_path is not None:
        write_text(
            json_path, json.dumps(report_json(runs, result_json(results), notes), indent=1, ensure_ascii=False) + "\n"
        )
    return Report(notes, sum(len(shown) for _, shown in exhibits), num_bytes)


def report_json(runs: Sequence[RunRecord], results: list[dict[str, Any]], notes: Sequence[str]) -> dict[str, Any]:
    """Return the page's numbers for other programs."""
    return {
        "runs": [{"name": run.name, "path": str(run.path), "key_metrics": dict(key_metrics(run))} for run in runs],
        "results": results,
        "zeros": [asdict(row) for row in zero_rows(runs)],
        "phases_s": [
            {"run": row.run, "total": row.total_s, **{name: seconds for name, seconds, _ in row.phases}}
            for row in phase_rows(runs)
        ],
        "notes": list(notes),
    }


def _gallery(
    runs: Sequence[RunRecord], chosen: Mapping[str, Sequence[Exhibit]], max_samples: int
) -> Iterator[tuple[RunRecord, list[Exhibit]]]:
    """Yield the samples of each run with their frames, the same number for each run."""
    samples_per_run = max_samples // len(runs)
    with VideoReader() as reader:
        for run in runs:
            shown = _spread(chosen[run.name], samples_per_run)
            progress = tqdm(with_frames(shown, reader), total=len(shown), desc="frames", unit="sample", delay=2)
            if shown:
                yield run, list(progress)


def _spread(exhibits: Sequence[Exhibit], count: int) -> list[Exhibit]:
    """Select `count` exhibits at even intervals, so that early and late steps and all benchmarks are included."""
    if len(exhibits) <= count:
        return list(exhibits)
    return [exhibits[index * len(exhibits) // count] for index in range(count)]


def _title(runs: Sequence[RunRecord]) -> str:
    names = [run.name for run in runs]
    return " · ".join(names) if len(runs) <= _MAX_NAMES else f"{names[0]} and {len(runs) - 1} more runs"


def _phase_titles(runs: Sequence[RunRecord]) -> list[tuple[RunRecord, str]]:
    return [
        (run, f"{run.name}: time of a step by phase" if len(runs) > 1 else "Time of a step by phase") for run in runs
    ]


def _extent(runs: Sequence[RunRecord], num_chosen: int, num_shown: int) -> Iterator[str]:
    """Yield how many answers the results are based on, and how many samples are shown."""
    num_answers, num_samples = num_answers_and_samples(runs)
    if num_answers:
        yield f"the results are based on {num_answers:,} answers to {num_samples:,} test samples"
    if num_shown < num_chosen:
        yield f"the gallery shows {num_shown} of {num_chosen} selected samples (--max-samples)"


def _grouped(notes: Sequence[tuple[str, str]], num_runs: int) -> list[str]:
    """Merge equal notes, and name their runs unless a note applies to all runs."""
    runs: dict[str, list[str]] = {}
    for run, note in notes:
        runs.setdefault(note, []).append(run)
    return [note if len(names) == num_runs else f"{', '.join(names)}: {note}" for note, names in runs.items()]


def _notes(run: RunRecord, problems: Sequence[str]) -> Iterator[str]:
    """Yield the notes of a run: files that cannot be read, and reasons to interpret the numbers with care."""
    yield from (*run.problems, *problems, *_caveats(run))


def _caveats(run: RunRecord) -> Iterator[str]:
    """Yield reasons to interpret the numbers with care."""
    columns = run.metrics.columns
    if not run.evaluations and not any(key.startswith(VALIDATION) for key in columns):
        yield "nothing was evaluated on held-out samples (vcr1 evaluate); the curves show training data"
    if run.setting("judge", "kind") == "lexical" and any(key.endswith("/recall") for key in columns):
        yield "captions were judged by word matching (judge.kind 'lexical'), not by a language model"
    if run.skipped:
        yield f"{len(run.skipped)} samples could not be used and are listed at the end"
    num_steps = int((run.metrics.steps > 0).sum())  # row 0 is the validation of the initial model
    if lost := num_steps - int(np.isfinite(columns.get("loss", np.array([]))).sum()):
        yield f"{lost} of {num_steps} steps have no finite loss"
    if (truncated := _last_tenth(run, "truncated_fraction")) > _HIGH_TRUNCATION:
        limit = run.setting("rollout", "max_new_tokens")
        yield f"{100 * truncated:.0f} % of the last responses were cut at {limit} tokens"
    alarm = run.setting("logging", "mismatch_threshold")
    if isinstance(alarm, int | float) and (gap := _last_tenth(run, "mismatch/mean_abs")) > alarm:
        yield f"log-probs of rollout and training differ by {short(gap)} nats on average, above {alarm}"
    for result in run.evaluations:
        if unjudged := result.details.get("num_unjudged"):
            yield f"evaluation/{result.label}: {unjudged} outputs could not be judged and are in no metric"
        differences = result.details.get("differs_from_training")
        for difference in differences if isinstance(differences, list) else ():
            yield f"evaluation/{result.label}: {difference}"
    if small := [result.label for result in run.evaluations if 0 < result.num_samples < _FEW_SAMPLES]:
        which = "every benchmark" if len(small) == len(run.evaluations) > 1 else ", ".join(small)
        yield f"{which}: fewer than {_FEW_SAMPLES} samples, so the confidence intervals are wide"


def _last_tenth(run: RunRecord, key: str) -> float:
    """Return a metric's mean over the last tenth of the steps; 0 if the run does not have the metric."""
    values = run.metrics.columns.get(key, np.array([]))
    last = values[-max(len(values) // 10, 1) :]
    return float(np.nanmean(last)) if np.isfinite(last).any() else 0.0
