"""Selects the curves of a report by the names of the metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vcr1.report.charts import Chart, Drawing, Line, draw, short, words
from megatron_vcr1.report.run_record import RunRecord

PARTS = ("total", "format", "iou", "accuracy", "recall")
PHASES = ("decode", "rollout", "judge", "reference", "old_log_probs", "update", "sync", "save", "validation")

VALIDATION = "validation/"
"""Prefix of the metrics of a validation, validation/LABEL/METRIC."""

MIN_PHASE_FRACTION = 0.005
"""Phases that take a smaller fraction of the time are not shown."""

_MAX_OTHER_CHARTS = 12


@dataclass(frozen=True)
class CurveSection:
    """Charts under one heading. `constant` lists metrics that never changed, with their value."""

    title: str
    note: str
    charts: Sequence[Drawing]
    constant: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class _Spec:
    """A chart defined by its metrics: `keys` maps each key to its label."""

    title: str
    unit: str
    keys: Mapping[str, str]


_SECTIONS: Sequence[tuple[str, str, Sequence[_Spec]]] = (
    (
        "Policy",
        "KL to the reference, ratio of policy to old-policy probability, fraction of tokens whose ratio was clipped.",
        (
            _Spec("KL to the reference", "nats per token", {"kl": "KL"}),
            _Spec("Entropy", "nats per token", {"entropy": "entropy"}),
            _Spec("Probability ratio", "mean", {"ratio/mean": "ratio"}),
            _Spec("Clip fraction", "of tokens", {"clip_fraction": "clipped"}),
        ),
    ),
    (
        "Responses",
        "Truncated responses were cut at rollout.max_new_tokens. A group without reward variance has no gradient, and "
        "dynamic sampling drops it. Responses without a verdict could not be judged.",
        (
            _Spec("Length", "tokens", {"response_tokens/mean": "mean", "response_tokens/max": "longest"}),
            _Spec("Truncated responses", "fraction", {"truncated_fraction": "truncated"}),
            _Spec("Groups", "per step", {"groups/zero_variance": "no reward variance", "groups/dropped": "dropped"}),
            _Spec("Responses without a verdict", "per step", {"responses/unscored": "responses"}),
            _Spec("Videos", "per step", {"skipped_samples": "skipped", "downscaled_videos": "downscaled to fit"}),
        ),
    ),
    (
        "Optimization",
        "",
        (
            _Spec("Loss", "", {"loss": "loss"}),
            _Spec("Gradient norm", "before clipping", {"grad_norm": "norm"}),
            _Spec("Learning rate", "", {"lr": "rate"}),
            _Spec("Skipped optimizer steps", "fraction", {"update_skipped": "not finite"}),
        ),
    ),
    (
        "Speed and memory",
        "",
        (
            _Spec("Throughput", "tokens/s", {"tokens_per_s": "tokens/s"}),
            _Spec(
                "Model FLOPs utilization",
                "fraction of peak",
                {
                    "mfu": "update",
                    "mfu_hardware": "update, with recomputation",
                    "mfu/reference": "reference",
                    "mfu/old_log_probs": "old log-probs",
                },
            ),
            _Spec("Model FLOPs", "TFLOP/s per rank, during the update", {"tflops_per_s": "TFLOP/s"}),
            _Spec("Prompt tokens in the engine's prefix cache", "fraction", {"cached_prompt_fraction": "cached"}),
            _Spec("Trained tokens", "per step", {"tokens": "tokens"}),
            _Spec("Peak memory", "GB", {"memory/peak_gb": "peak"}),
        ),
    ),
    (
        "Mismatch between rollout and training",
        "Log-probs of the sampled tokens, computed by the rollout engine and by the training model. A difference means "
        "that the two compute different policies.",
        (
            _Spec("Log-prob difference", "nats", {"mismatch/mean_abs": "mean", "mismatch/max_abs": "largest"}),
            _Spec("KL between rollout and training", "nats per token", {"mismatch/kl": "KL"}),
            _Spec("Policy lag", "steps", {"policy_lag": "lag"}),
        ),
    ),
)


def curve_sections(runs: Sequence[RunRecord]) -> list[CurveSection]:
    """Return the charts by section.

    For one run, a chart shows all parts of a reward. For several runs, each metric has its own chart, with one line per
    run.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run.metrics.columns))
    weighted = "parts, with their weights (rewards.weights)," if runs[0].setting("rewards", "weights") else "parts"
    note = f"The {weighted} add up to the total, which GRPO maximizes." if len(runs) == 1 else ""
    validation = (
        "Validation",
        "Benchmarks on held-out samples during training, with greedy decoding; step 0 is the initial model. A reward "
        "that rises while these fall means that the policy learns the reward and not the task.",
        list(_validation_specs(keys)),
    )
    sections = [("Reward", note, list(_reward_specs(keys))), validation, *_SECTIONS]
    shown = {key for _, _, specs in sections for spec in specs for key in spec.keys}
    # The number of the step, phases that the report shows as bars, and metrics that MFU and TFLOP/s replace.
    hidden = ("policy_version", "zero_rewards/", "time/", "model_flops", "hardware_flops", VALIDATION)
    other = [key for key in keys if key not in shown and not key.startswith(hidden)]
    sections.append(("Other metrics", "", [_Spec(key, "", {key: key}) for key in other[:_MAX_OTHER_CHARTS]]))
    drawn = [
        _section(title, note, [chart for spec in specs for chart in _charts(runs, spec)])
        for title, note, specs in sections
    ]
    return [section for section in drawn if section.charts or section.constant]


def phase_chart(run: RunRecord, title: str) -> Drawing | None:
    """Return a stacked chart of the seconds per phase of each step; None if nothing was timed."""
    metrics = run.metrics
    lines = [
        Line(phase, metrics.steps, metrics.columns[f"time/{phase}_s"], phase_colour(phase)) for phase in phases(run)
    ]
    return draw(Chart(title, "seconds", lines, stacked=True))


def phase_colour(phase: str) -> int:
    """Return the colour number of a phase; all unknown phases share one colour."""
    return PHASES.index(phase) if phase in PHASES else len(PHASES)


def phases(run: RunRecord) -> list[str]:
    """Return the phases that took at least MIN_PHASE_FRACTION of the time, in the order of a step."""
    timed = {
        key[len("time/") : -len("_s")]: float(np.nansum(seconds))
        for key, seconds in run.metrics.columns.items()
        if key.startswith("time/") and key.endswith("_s")
    }
    least_s = MIN_PHASE_FRACTION * timed.pop("total", sum(timed.values()))
    timed = {phase: seconds for phase, seconds in timed.items() if seconds > least_s}
    known = [phase for phase in PHASES if phase in timed]
    return [*known, *sorted(set(timed) - set(known))]


def _reward_specs(keys: Sequence[str]) -> Iterator[_Spec]:
    if "reward/total" in keys:
        yield _Spec("All tasks", "reward", {"reward/total": "total"})
    parts_by_task: dict[str, list[str]] = {}
    for key in keys:
        prefix, _, rest = key.partition("/")
        task, slash, part = rest.partition("/")
        if prefix == "reward" and slash:
            parts_by_task.setdefault(task, []).append(part)
    for task, parts in parts_by_task.items():
        ordered = [*(part for part in PARTS if part in parts), *sorted(set(parts) - set(PARTS))]
        title = words(task)
        keys_of_parts = {f"reward/{task}/{part}": words(part) for part in ordered}
        yield _Spec(title[:1].upper() + title[1:], "reward", keys_of_parts)


def _validation_specs(keys: Sequence[str]) -> Iterator[_Spec]:
    """Yield a chart for each benchmark with its strict metrics, without the counts of its samples."""
    by_label: dict[str, dict[str, str]] = {}
    for key in keys:
        label, slash, metric = key.removeprefix(VALIDATION).partition("/")
        if key.startswith(VALIDATION) and slash and not metric.startswith("num_") and not metric.endswith(" (lenient)"):
            by_label.setdefault(label, {})[key] = metric
    for label, names in by_label.items():
        yield _Spec(label, "fraction", names)


def _section(title: str, note: str, charts: Sequence[Chart]) -> CurveSection:
    drawings, constant = [], []
    for chart in charts:
        values = np.concatenate([line.values[np.isfinite(line.values)] for line in chart.lines] or [np.array([])])
        if len(values) and values.min() == values.max():
            constant.append((chart.title, short(float(values[0]))))
        elif drawing := draw(chart):
            drawings.append(drawing)
    return CurveSection(title, note, drawings, constant)


def _charts(runs: Sequence[RunRecord], spec: _Spec) -> Iterator[Chart]:
    if len(runs) == 1:
        run, labels = runs[0], enumerate(spec.keys.items())
        lines = [_line(run, key, label, colour) for colour, (key, label) in labels if key in run.metrics.columns]
        yield Chart(spec.title, spec.unit, lines)
        return
    for key, label in spec.keys.items():
        title = spec.title if len(spec.keys) == 1 else f"{spec.title}: {label}"
        yield Chart(title, spec.unit, _run_lines(runs, key))


def _run_lines(runs: Sequence[RunRecord], key: str) -> list[Line]:
    return [_line(run, key, run.name, colour) for colour, run in enumerate(runs) if key in run.metrics.columns]


def _line(run: RunRecord, key: str, label: str, colour: int) -> Line:
    steps, values = run.metrics.steps, run.metrics.columns[key]
    if key.startswith(VALIDATION):  # only some steps have a validation: the line connects these
        measured = np.isfinite(values)
        steps, values = steps[measured], values[measured]
    return Line(label, steps, values, colour)
