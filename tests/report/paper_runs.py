"""Creates run directories with the results that the paper's tables show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

TASKS = {
    "charades_sta": "temporal_grounding",
    "activitynet": "temporal_grounding",
    "nextgqa": "grounded_qa",
    "got10k": "tracking",
    "dream1k": "captioning",
    "vidtab": "quality",
}


def add_result(
    run: Path,
    benchmark: str,
    model: str = "/models/base",
    *,
    training_run: Path | None = None,
    label: str = "",
    thinking: bool = False,
    prompt: str = "",
    **metrics: float,
) -> None:
    """Create evaluation/LABEL/metrics.json. In the names of metrics, `at_0_5` stands for `@0.5`."""
    names = {name: name.replace("_at_0_", "@0.") for name in metrics}
    content = {
        "benchmark": benchmark,
        "task": TASKS.get(benchmark, "multiple_choice_qa"),
        "prompt": prompt or TASKS.get(benchmark, "multiple_choice_qa"),
        "model": model,
        "training_run": str(training_run) if training_run else None,
        "thinking": thinking,
        "num_samples": 100,
        "metrics": {names[name]: {"value": value} for name, value in metrics.items()},
    }
    folder = run / "evaluation" / (label or benchmark)
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(content))


def make_trained_run(
    run: Path,
    tasks: Sequence[str],
    *,
    stage: str = "grpo",
    thinking: bool = False,
    epochs: float = 1,
    base: str = "/models/base",
) -> Path:
    """Create the settings, manifests and metrics of a run that trained on tasks."""
    run.mkdir(parents=True)
    lines = [f"[model]\npath = '{base}'\n[train]\nstage = '{stage}'\nnum_epochs = {epochs}"]
    for task in tasks:
        (run / f"{task}.jsonl").write_text(json.dumps({"id": "1", "task": task}) + "\n")
        lines.append(f"[[data.sources]]\nmanifest = '{run / task}.jsonl'\nthinking = {str(thinking).lower()}")
    (run / "config.toml").write_text("\n".join(lines))
    rewards = {f"reward/{task}/total": 1.0 for task in tasks} if stage == "grpo" else {}
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.1, **rewards}) + "\n")
    return run
