"""step: whole GRPO steps by phase, by `vcr1 train` on real video files.

Without --model and --data, the demo's tiny model on synthesized videos: what the parts around the model cost. With
them, a run's own model and manifest. Other settings are those of a run: `--set grpo.group_size=16 parallel.tensor=2`.
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

from megatron_vcr1.data.synthesize import synthesize
from megatron_vcr1.errors import UserError
from megatron_vcr1.types import Task
from throughput.measure import Spread, add_json_argument, command_line, machine, print_table, write_json

DEMO_MODEL = Path(__file__).parents[2] / "examples/demo/tiny_model.py"
PHASES = ("decode", "rollout", "judge", "reference", "update", "sync", "total")
FIGURES = ("tokens_per_s", "tflops_per_s", "mfu", "memory/peak_gb", "response_tokens/mean")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "step",
        help="whole GRPO steps by phase",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=Path, help="a directory with weights and a tokenizer")
    parser.add_argument("--data", type=Path, help="a manifest")
    parser.add_argument("--steps", type=int, default=6, help="after one that warms up (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=8, help="of a step (default: %(default)s)")
    parser.add_argument("--response-tokens", type=int, default=64, help="most of a response (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="of this machine (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="other settings of the run")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="also write a trace and a summary of two steps")
    add_json_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="benchmark-step-") as name:
        folder = Path(name)
        model = args.model or _tiny_model(folder / "model")
        manifest = args.data or _videos(folder / "data", args.prompts)
        rows = _train(args, folder, model, manifest)
    timed = rows[1:]
    seconds = {phase: [row[f"time/{phase}_s"] for row in timed] for phase in PHASES}
    figures = {key: [row[key] for row in timed] for key in FIGURES if all(key in row for row in timed)}
    result = machine() | {
        "command": command_line(args),
        "model": str(args.model or "the demo's"),
        "seconds": seconds,
        "figures": figures,
    }
    write_json(args.json, result)
    total = Spread.of(seconds["total"]).median
    table = [
        (phase, Spread.of(values).text(3), f"{100 * Spread.of(values).median / total:.0f} %")
        for phase, values in seconds.items()
        if any(values)
    ]
    more = ", ".join(f"{key} {Spread.of(values).median:.4g}" for key, values in figures.items())
    title = (
        f"GRPO step, {args.prompts} prompts, {result['model']} model, {args.processes} process(es), {result['device']}"
    )
    print_table(title, ("", "seconds", "of the step"), table, f"Median (range) of {len(timed)} steps. {more}")
    return 0


def _tiny_model(folder: Path) -> Path:
    runpy.run_path(str(DEMO_MODEL))["write_model"](folder, seed=0)
    return folder


def _videos(folder: Path, num_videos: int) -> Path:
    """The manifest of temporal grounding on videos of moving shapes."""
    for _ in synthesize(folder, num_videos=num_videos, num_test_videos=1, seed=0, tasks=(Task.TEMPORAL_GROUNDING,)):
        pass
    return folder / "train.jsonl"


def _train(args: argparse.Namespace, folder: Path, model: Path, manifest: Path) -> list[dict[str, Any]]:
    """Rows of the run's metrics."""
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
    settings |= dict(one.partition("=")[::2] for one in args.set)
    config = folder / "run.toml"
    config.write_text(f"[[data.sources]]\nmanifest = {json.dumps(str(manifest))}\n")
    command = [sys.executable]
    if args.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.processes)]
    command += ["-m", "megatron_vcr1", "train", str(config)]
    command += [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise UserError("vcr1 train failed; its message is above")
    if args.profile:
        shutil.copytree(run_dir / "profile", args.profile, dirs_exist_ok=True)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
