"""Creates run directories as training and evaluation leave them, with synthetic videos and made-up numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random

from megatron_vcr1.config.rendering import default_config, render_toml
from megatron_vcr1.data.manifest import read_manifest
from megatron_vcr1.data.rows import row_from_sample
from megatron_vcr1.data.synthesize import synthesize
from megatron_vcr1.data.templates import load_templates, target_text
from megatron_vcr1.report.run_record import RunRecord, read_run
from megatron_vcr1.rewards import score
from megatron_vcr1.types import Sample

PHASES = {"decode": 1.2, "rollout": 6.0, "reference": 1.5, "update": 4.5, "sync": 0.4}


def make_run(folder: Path, samples: Sequence[Sample], *, num_steps: int = 40, seed: int = 0, gain: float = 1.0) -> Path:
    """Create a GRPO run with rising rewards, and with rollouts of its first, middle and last step."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(render_toml(default_config(), documented=False))
    start = {
        "step": 0,
        "started": "2026-11-24T06:00:00+00:00",
        "host": "node1",
        "ranks": 8,
        "device": "H100",
        "torch": "2.13.0",
    }
    (folder / "starts.jsonl").write_text(json.dumps(start | {"command": "vcr1 train run.toml"}) + "\n")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, num_steps + 1):
            file.write(json.dumps(metrics(step, num_steps, Random(f"{seed}/{step}"), gain)) + "\n")
    (folder / "rollouts").mkdir()
    for step in sorted({1, num_steps // 2, num_steps}):
        groups = [rollout_group(sample, step, Random(f"{seed}/{step}/{sample.id}")) for sample in samples]
        (folder / f"rollouts/step_{step}.jsonl").write_text("".join(json.dumps(group) + "\n" for group in groups))
    return folder


def metrics(step: int, num_steps: int, random: Random, gain: float = 1.0) -> dict[str, float]:
    """Return one line of metrics.jsonl."""
    learned = gain * (1 - math.exp(-3 * step / num_steps))

    def noisy(value: float) -> float:
        return value * random.uniform(0.85, 1.15)

    parts = {"format": noisy(0.4 + 0.55 * learned), "iou": noisy(0.1 + 0.45 * learned)}
    row: dict[str, float] = {"step": step, "loss": random.gauss(0, 0.02), "lr": 1e-6, "grad_norm": noisy(1.4)}
    row["reward/total"] = sum(parts.values())
    for task in ("temporal_grounding", "tracking"):
        row |= {f"reward/{task}/{part}": value for part, value in parts.items()}
        row[f"reward/{task}/total"] = sum(parts.values())
        row[f"zero_rewards/{task}/format/no <answer>"] = int(20 * (1 - learned)) + random.randrange(3)
        row[f"zero_rewards/{task}/iou/no overlap"] = int(12 * (1 - learned)) + random.randrange(3)
    row |= {"kl": noisy(0.02 * learned), "entropy": noisy(1.2 - 0.6 * learned), "ratio/mean": 1.0, "clip_fraction": 0.0}
    row |= {
        "response_tokens/mean": noisy(140 + 60 * learned),
        "response_tokens/max": noisy(420),
        "truncated_fraction": 0.01,
    }
    row |= {
        "groups/dropped": random.randrange(3),
        "skipped_samples": 0,
        "tokens_per_s": noisy(9800),
        "mfu": noisy(0.41),
    }
    times = {f"time/{phase}_s": noisy(seconds) for phase, seconds in PHASES.items()}
    row |= {**times, "time/total_s": sum(times.values()) + 0.5, "memory/peak_gb": 61.5, "policy_lag": 0}
    row |= {"mismatch/mean_abs": noisy(0.004), "mismatch/max_abs": noisy(0.09), "mismatch/kl": noisy(2e-5)}
    return row


def rollout_group(sample: Sample, step: int, random: Random) -> dict[str, object]:
    """Return one line of rollouts/step_N.jsonl with a correct, an inaccurate and a missing answer."""
    texts = [f"<think>I look at the frames.</think>{answer}" for answer in (right_answer(sample), wrong_answer(sample))]
    responses = []
    for text in (*texts, "<think>I am not sure, it may be"):
        reward = score(sample, text, thinking=True, judged=0.5 if sample.task == "captioning" else None)
        responses.append(
            {
                "text": text,
                "num_tokens": len(text.split()),
                "finish_reason": "stop",
                "advantage": random.gauss(0, 1),
                "reward": {**reward.parts, "total": reward.total, "reasons": reward.reasons, "extra": {}},
            }
        )
    row = {"step": step, "sample": row_from_sample(sample), "thinking": True, "policy_version": step - 1}
    return row | {"responses": responses}


def add_evaluation(
    run: Path, label: str, manifest: Path, *, right: float, model: str = "models/tiny", thinking: bool = False
) -> None:
    """Create evaluation/LABEL; `right` is the fraction of correct answers."""
    samples = read_manifest(manifest)
    folder = run / "evaluation" / label
    folder.mkdir(parents=True)
    num_right = round(right * len(samples))
    answers = [right_answer(sample) if i < num_right else wrong_answer(sample) for i, sample in enumerate(samples)]
    lines = [{"id": sample.id, "output": answer} for sample, answer in zip(samples, answers, strict=True)]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        {
            "id": sample.id,
            "metrics": {"mIoU": float(i < num_right)},
            "reasons": {} if i < num_right else {"iou": "no overlap"},
        }
        for i, sample in enumerate(samples)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"mIoU": right, "R@0.5": 0.9 * right, "R@0.7": 0.7 * right}
    summary = {
        "benchmark": "charades_sta",
        "label": label,
        "model": model,
        "thinking": thinking,
        "num_samples": len(samples),
        "manifest": str(manifest),
        "metrics": {
            name: {"value": value, "low": max(value - 0.05, 0.0), "high": min(value + 0.05, 1.0)}
            for name, value in values.items()
        },
    }
    (folder / "metrics.json").write_text(json.dumps(summary))


def report_run(
    folder: Path, *rows: dict[str, float], config: str = "", **benchmarks: dict[str, tuple[float, float, float]]
) -> RunRecord:
    """Return a run as the report reads it, from rows of metrics and from results (value, low, high) by benchmark."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.toml").write_text(config)
    for label, estimates in benchmarks.items():
        (folder / "evaluation" / label).mkdir(parents=True)
        metrics = {name: dict(zip(("value", "low", "high"), values, strict=True)) for name, values in estimates.items()}
        summary = {"benchmark": "charades_sta", "model": "m", "num_samples": 9, "metrics": metrics, "judge": "words"}
        (folder / "evaluation" / label / "metrics.json").write_text(json.dumps(summary))
    return read_run(folder)


@cache
def synthetic_manifest(folder: Path) -> Path:
    """Create a manifest with one video per task."""
    for _ in synthesize(folder, num_videos=6, num_test_videos=2, seed=3):
        pass
    return folder / "train.jsonl"


def right_answer(sample: Sample) -> str:
    return target_text(sample, load_templates())


def wrong_answer(sample: Sample) -> str:
    """Return a well-formed but inaccurate answer."""
    match sample.task:
        case "temporal_grounding":
            (truth,) = sample.intervals
            return f"<answer>{truth.start_s + 1:.2f} to {truth.end_s + 2:.2f}</answer>"
        case "tracking":
            return "<answer>[" + ", ".join(["[0.2, 0.2, 0.6, 0.6]"] * 8) + "]</answer>"
        case "grounded_qa":
            return "<answer>B</answer><glue>[(0.5, 3.0), (6.0, 20.0)]</glue>"
    return "<answer>none of these</answer>"
