"""Puts a report together: one HTML file that asks nothing of the network and runs no script.

Everything that a model or a data set wrote is text here, never markup: the templates escape what they are given, and
the page's own policy forbids scripts and connections, should anything slip through.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import ChainableUndefined, Environment, PackageLoader
from tqdm import tqdm

from megatron_vcr1.data.video_process import VideoReader
from megatron_vcr1.evaluation.report.charts import MAX_POINTS, short
from megatron_vcr1.evaluation.report.curves import curve_sections, phase_chart
from megatron_vcr1.evaluation.report.gallery import Exhibit, evaluation_exhibits, rollout_exhibits, with_frames
from megatron_vcr1.evaluation.report.run_record import RunRecord
from megatron_vcr1.evaluation.report.tables import (
    MAX_REASONS,
    key_figures,
    phase_rows,
    result_json,
    result_table,
    settings_that_differ,
    zero_rows,
)

_MAX_SKIPPED = 50
_MAX_STARTS = 20
_HIGH_TRUNCATION = 0.05
_FEW_SAMPLES = 200


@dataclass(frozen=True)
class Report:
    """What was written."""

    notes: Sequence[str]
    num_samples: int
    num_bytes: int


def write_report(runs: Sequence[RunRecord], out: Path, *, max_samples: int, json_path: Path | None = None) -> Report:
    """Writes the page, and on request its numbers as JSON; each file appears only when it is complete.

    Args:
        runs: the first is what the others are compared with.
        max_samples: of the gallery, over all runs; bounds the page's size, about 60 kB each.
    """
    problems: dict[str, list[str]] = {run.name: [] for run in runs}
    exhibits = list(_gallery(runs, max_samples, problems))
    notes = _grouped([(run.name, note) for run in runs for note in _notes(run, problems[run.name])])
    results = result_table(runs)
    if missing := sum(1 for _, shown in exhibits for exhibit in shown if exhibit.missing):
        notes.append(f"videos of the gallery that cannot be shown: {missing}, each with the reason")
    zeros = zero_rows(runs)
    context = {
        "runs": runs,
        "stages": list(dict.fromkeys(str(run.setting("train", "stage") or "run").upper() for run in runs)),
        "title": " · ".join(run.name for run in runs),
        "notes": notes,
        "figures": [(run, key_figures(run)) for run in runs],
        "results": results,
        "sections": curve_sections(runs),
        "zeros": zeros[:MAX_REASONS],
        "num_more_zeros": max(len(zeros) - MAX_REASONS, 0),
        "phases": phase_rows(runs),
        "phase_charts": [(run, chart) for run in runs if (chart := phase_chart(run))],
        "gallery": exhibits,
        "skipped": [(run, list(run.skipped.items())) for run in runs if run.skipped],
        "max_skipped": _MAX_SKIPPED,
        "max_starts": _MAX_STARTS,
        "max_points": MAX_POINTS,
        "differing": settings_that_differ(runs) if len(runs) > 1 else {},
        "written": datetime.now().astimezone(),
        "made_with": f"megatron_vcr1 {version('megatron_vcr1')}, Python {platform.python_version()}",
    }
    num_bytes = _write(out, _environment().get_template("page.html.jinja").render(context))
    if json_path is not None:
        _write(
            json_path, json.dumps(report_json(runs, result_json(results), notes), indent=1, ensure_ascii=False) + "\n"
        )
    return Report(notes, sum(len(shown) for _, shown in exhibits), num_bytes)


def report_json(runs: Sequence[RunRecord], results: list[dict[str, Any]], notes: Sequence[str]) -> dict[str, Any]:
    """The page's numbers for another program."""
    return {
        "runs": [{"name": run.name, "path": str(run.path), "figures": dict(key_figures(run))} for run in runs],
        "results": results,
        "zeros": [asdict(row) for row in zero_rows(runs)],
        "phases_s": [
            {"run": row.run, "total": row.total_s, **{name: seconds for name, seconds, _ in row.phases}}
            for row in phase_rows(runs)
        ],
        "notes": list(notes),
    }


def _gallery(
    runs: Sequence[RunRecord], max_samples: int, problems: dict[str, list[str]]
) -> Iterator[tuple[RunRecord, list[Exhibit]]]:
    """Each run's samples, an equal number of each, with their frames."""
    share = max_samples // len(runs)
    with VideoReader() as reader:
        for run in runs:
            chosen = [*rollout_exhibits(run, problems[run.name]), *evaluation_exhibits(run, problems[run.name])]
            if len(chosen) > share:
                problems[run.name].append(f"gallery: {share} of {len(chosen)} chosen samples are shown (--max-samples)")
            shown = _spread(chosen, share)
            progress = tqdm(with_frames(shown, reader), total=len(shown), desc="frames", unit="video", delay=2)
            if shown:
                yield run, list(progress)


def _spread(exhibits: Sequence[Exhibit], count: int) -> list[Exhibit]:
    """`count` of them, evenly, so that early and late steps and every benchmark stay."""
    if len(exhibits) <= count:
        return list(exhibits)
    return [exhibits[index * len(exhibits) // count] for index in range(count)]


def _grouped(notes: Sequence[tuple[str, str]]) -> list[str]:
    """Notes with the runs that they are of; without, where there is one run."""
    runs: dict[str, list[str]] = {}
    for run, note in notes:
        runs.setdefault(note, []).append(run)
    several = len({run for run, _ in notes}) > 1
    return [f"{', '.join(names)}: {note}" if several else note for note, names in runs.items()]


def _notes(run: RunRecord, problems: Sequence[str]) -> Iterator[str]:
    """What a reader should know before believing the numbers."""
    yield from (*run.problems, *problems, *_doubts(run))


def _doubts(run: RunRecord) -> Iterator[str]:
    columns = run.metrics.columns
    if not run.evaluations:
        yield "nothing was evaluated on held-out samples (vcr1 evaluate): the curves are of the training data"
    if run.setting("judge", "kind") == "lexical" and any(key.endswith("/recall") for key in columns):
        yield "captions were judged by matching words (judge.kind 'lexical'), not by a language model"
    if run.skipped:
        yield f"samples that could not be used: {len(run.skipped)}, listed at the end"
    if len(run.metrics) and (lost := len(run.metrics) - int(np.isfinite(columns.get("loss", np.array([]))).sum())):
        yield f"{lost} of {len(run.metrics)} steps have no finite loss"
    if (truncated := _last_tenth(run, "truncated_share")) > _HIGH_TRUNCATION:
        yield f"{truncated:.0%} of the last responses were cut at {run.setting('rollout', 'max_new_tokens')} tokens"
    alarm = run.setting("logging", "mismatch_alarm")
    if isinstance(alarm, int | float) and (gap := _last_tenth(run, "mismatch/mean_abs")) > alarm:
        yield f"log-probs of rollout and training differ by {short(gap)} nats on average, above {alarm}"
    for result in run.evaluations:
        if unjudged := result.details.get("num_unjudged"):
            yield f"evaluation/{result.label}: outputs that no judge could judge, in no figure: {unjudged}"
    if small := [result.label for result in run.evaluations if 0 < result.num_samples < _FEW_SAMPLES]:
        yield f"fewer than {_FEW_SAMPLES} samples, so wide intervals: {', '.join(small)}"


def _last_tenth(run: RunRecord, key: str) -> float:
    """Mean of the last tenth of the steps; 0 where the metric is not there."""
    values = run.metrics.columns.get(key, np.array([]))
    last = values[-max(len(values) // 10, 1) :]
    return float(np.nanmean(last)) if np.isfinite(last).any() else 0.0


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("megatron_vcr1.evaluation.report"),
        autoescape=True,
        undefined=ChainableUndefined,  # a row that another version wrote may lack a key
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"short": short, "percent": _percent, "path_end": _path_end}
    return environment


def _percent(value: float, *, sign: bool = False) -> str:
    """A share as the paper prints it: 0.6084 is 60.8; with `sign`, a difference of shares."""
    return f"{100 * value:+.1f}" if sign else f"{100 * value:.1f}"


def _path_end(path: str) -> str:
    """The last two parts of a path, which tell models apart."""
    parts = Path(path).parts
    return str(Path("…", *parts[-2:])) if len(parts) > 3 else path


def _write(path: Path, text: str) -> int:
    """Writes UTF-8, lone halves of surrogate pairs as question marks; returns the size in bytes."""
    content = text.encode("utf-8", "replace")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(content)
    unfinished.replace(path)
    return len(content)
