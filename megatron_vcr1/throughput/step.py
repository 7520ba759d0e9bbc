"""Measure whole GRPO steps by phase: `vcr1 train` on real video files.

Without --model and --data, the demo's tiny model trains on synthetic videos, which shows the cost of everything around
the model. Other settings of the run can be given with --set, for example --set grpo.group_size=16 parallel.tensor=2.
"""

from __future__ import annotations

import argparse
import json
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megatron_vcr1.command_line import positive, write_json
from megatron_vcr1.data.synthesize import synthesize
from megatron_vcr1.errors import UserError
from megatron_vcr1.throughput.measure import Spread, print_table, provenance
from megatron_vcr1.training.metrics import PHASES

HELP = "whole GRPO steps by phase"
DEMO_MODEL = Path(__file__).parents[2] / "examples/demo/tiny_model.py"
METRICS = ("tokens_per_s", "tflops_per_s", "mfu", "memory/peak_gb", "response_tokens/mean")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, metavar="DIR", help="directory with weights and tokenizer")
    parser.add_argument("--data", type=Path, metavar="FILE", help="manifest")
    parser.add_argument(
        "--steps", type=positive, default=6, metavar="N", help="measured steps, after a warm-up step (default: 6)"
    )
    parser.add_argument("--prompts", type=positive, default=8, metavar="N", help="prompts per step (default: 8)")
    parser.add_argument(
        "--response-tokens", type=positive, default=64, metavar="N", help="longest response (default: %(default)s)"
    )
    parser.add_argument("--processes", type=positive, default=1, metavar="N", help="ranks on this machine (default: 1)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other settings of the run")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="also write a trace and a summary of two steps")


def run(args: argparse.Namespace) -> int:
    for setting in args.set:
        if "=" not in setting:
            raise UserError(f"--set {setting}: write KEY=VALUE, for example grpo.group_size=16")
    with tempfile.TemporaryDirectory(prefix="benchmark-step-") as name:
        folder = Path(name)
        model = args.model or _tiny_model(folder / "model")
        manifest = args.data or _videos(folder / "data", args.prompts)
        rows = _train(args, folder, model, manifest)[1:]
    seconds = {phase: [row[f"time/{phase}_s"] for row in rows] for phase in PHASES}
    metrics = {key: [row[key] for row in rows] for key in METRICS if all(key in row for row in rows)}
    model_name = str(args.model or "the demo's model")
    result = provenance(args) | {
        "model": model_name,
        "seconds": seconds,
        "metrics": metrics,
    }
    write_json(args.json, result)
    total = Spread.of(seconds["total"]).median
    table = [
        (phase, Spread.of(values).text(3), f"{100 * Spread.of(values).median / total:.0f} %")
        for phase, values in seconds.items()
        if any(values)
    ]
    medians = ", ".join(f"{key} {Spread.of(values).median:.4g}" for key, values in metrics.items())
    title = f"GRPO step of {model_name}: {args.prompts} prompts, {args.processes} rank(s), {result['device']}"
    print_table(title, ("", "seconds", "of the step"), table, f"Median (range) of {len(rows)} steps. {medians}")
    return 0


def _tiny_model(folder: Path) -> Path:
    if not DEMO_MODEL.exists():
        raise UserError("--model: name a directory with weights and tokenizer; the demo's model comes with a checkout")
    runpy.run_path(str(DEMO_MODEL))["write_model"](folder, seed=0)
    return folder


def _videos(folder: Path, num_videos: int) -> Path:
    """Write videos of moving shapes and return the manifest for temporal grounding."""
    for _ in synthesize(folder, num_videos=num_videos, num_test_videos=1, seed=0, tasks=("temporal_grounding",)):
        pass
    return folder / "train.jsonl"


def _train(args: argparse.Namespace, folder: Path, model: Path, manifest: Path) -> list[dict[str, Any]]:
    """Run the training and return the rows of its metrics.jsonl."""
    run_dir = folder / "run"
    settings = {
        "model.path": str(model),
        "train.run_dir": str(run_dir),
        "train.num_steps": args.steps + 1,
        "train.prompts_per_step": args.prompts,
        "rollout.max_new_tokens": args.response_tokens,
        "checkpoint.every_steps": 10**6,
        "checkpoint.export": "never",
        "logging.tensorboard": "false",
    }
    if args.profile:
        settings |= {"profile.enabled": "true"}
    settings |= dict(setting.partition("=")[::2] for setting in args.set)
    config = folder / "run.toml"
    config.write_text(f"[[data.sources]]\nmanifest = {json.dumps(str(manifest))}\n")
    command = [sys.executable]
    if args.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    command += ["-m", "megatron_vcr1", "train", str(config)]
    command += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise UserError("vcr1 train failed; its message is above")
    if args.profile:
        shutil.copytree(run_dir / "profile", args.profile, dirs_exist_ok=True)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
