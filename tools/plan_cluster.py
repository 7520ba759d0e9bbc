#!/usr/bin/env python3
"""Predict memory, time and cost of a GRPO run on a cluster, for every parallel layout.

Examples:

    python tools/plan_cluster.py --model qwen2.5-vl-7b --nodes 16 --gpu h100
    python tools/plan_cluster.py --model qwen2.5-vl-7b --growth --plot growth.png
    python tools/plan_cluster.py --gpu h200 --calibrate update-1.json update-2.json

The defaults describe the paper's joint run: 18,031 samples, 8 responses per prompt, one prompt per GPU and step. The
predictions use the GPUs' published peak rates and assumed efficiencies; --calibrate replaces these by measured ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster_plan import report
from cluster_plan.calibration import Measured, calibrate
from cluster_plan.devices import DEVICES, Device
from cluster_plan.job import Job
from cluster_plan.search import Cluster, Plan, search
from command_line import positive, run_tool, tool_parser, write_json
from model_presets import add_model_argument, model_config
from rich.console import Console
from tqdm import tqdm

from megatron_vcr1.errors import UserError

GROWTH_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


def build_parser() -> argparse.ArgumentParser:
    parser = tool_parser(__doc__)
    add_model_argument(parser, default="qwen2.5-vl-7b")
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("--nodes", type=positive, default=1, metavar="N", help="(default: %(default)s)")
    cluster.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="(default: %(default)s)")
    cluster.add_argument("--gpu", choices=list(DEVICES), default="h100", help="(default: %(default)s)")
    cluster.add_argument(
        "--calibrate",
        nargs="+",
        type=Path,
        metavar="JSON",
        help="results of `benchmark_throughput.py train --json` on this GPU",
    )
    job = parser.add_argument_group("run")
    numbers = {
        "--prompts-per-step": (None, "prompts per step (default: one per GPU)"),
        "--group-size": (8, "responses per prompt (default: %(default)s)"),
        "--prompt-tokens": (3840, "text and vision tokens of a prompt (default: %(default)s)"),
        "--response-tokens": (200, "mean tokens of a response (default: %(default)s)"),
        "--longest-response": (500, "tokens of the longest response of a step (default: %(default)s)"),
        "--samples": (18_031, "samples per epoch (default: %(default)s)"),
    }
    for option, (default, text) in numbers.items():
        job.add_argument(option, type=positive, default=default, metavar="N", help=text)
    job.add_argument("--epochs", type=float, default=1.0, metavar="N", help="(default: %(default)s)")
    job.add_argument(
        "--freeze",
        nargs="+",
        default=(),
        choices=("vision_tower", "merger", "language_model"),
        metavar="PART",
        help="parts that are not trained: vision_tower, merger, language_model",
    )
    job.add_argument(
        "--reference",
        choices=("swap", "resident", "none"),
        default="swap",
        help="where the reference is kept, see grpo.reference (default: %(default)s)",
    )
    parser.add_argument("--growth", action="store_true", help="compare the best layouts of 8 to 1,024 GPUs")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="with --growth: also draw a plot (needs matplotlib)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the plans to a JSON file")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    return run_tool("plan_cluster", lambda: run(args))


def run(args: argparse.Namespace) -> int:
    device = DEVICES[args.gpu]
    console = Console()
    if args.calibrate:
        runs = [Measured.from_file(path) for path in args.calibrate]
        device = calibrate(device, runs)
        console.print(report.calibration_table(runs, device), "")
    else:
        console.print("Based on published peak rates and assumed efficiencies; --calibrate uses measured ones.\n")
    if args.growth:
        return _growth(args, device, console)
    num_gpus = args.nodes * args.gpus_per_node
    job = _job(args, args.prompts_per_step or num_gpus)
    plans, refusals = search(job, Cluster(device, num_gpus, args.gpus_per_node), args.longest_response)
    if plans:
        report.print_plans(console, plans)
    if refusals:
        console.print(report.refusals_table(refusals))
    document = {
        "device": dataclasses.asdict(device),
        "plans": [report.as_json(plan) for plan in plans],
        "refused": [dataclasses.asdict(refusal) for refusal in refusals],
    }
    write_json(args.json, document)
    if not plans:
        print(f"plan_cluster: no layout of {num_gpus} {device.name} can run this; see the reasons", file=sys.stderr)
    return 0 if plans else 1


def _job(args: argparse.Namespace, prompts_per_step: int) -> Job:
    try:
        job = Job(
            config=model_config(args.model),
            prompts_per_step=prompts_per_step,
            group_size=args.group_size,
            prompt_tokens=args.prompt_tokens,
            response_tokens=args.response_tokens,
            num_samples=args.samples,
            num_epochs=args.epochs,
            freeze=tuple(args.freeze),
            with_reference=args.reference != "none",
            reference_resident=args.reference == "resident",
        )
        job.prompt()  # a prompt that is too short for a video is an error
    except ValueError as error:
        raise UserError(f"--prompt-tokens: {error}") from None
    return job


def _growth(args: argparse.Namespace, device: Device, console: Console) -> int:
    """Print the best layout of every cluster size, with one prompt per GPU and step or with a fixed number."""
    rows: list[Plan | tuple[int, int, str]] = []
    for num_gpus in tqdm(GROWTH_GPUS, desc="cluster sizes", leave=False):
        job = _job(args, args.prompts_per_step or num_gpus)
        plans, refusals = search(job, Cluster(device, num_gpus, args.gpus_per_node), args.longest_response)
        rows.append(plans[0] if plans else (num_gpus, job.prompts_per_step, refusals[0].reason))
    best = [row for row in rows if isinstance(row, Plan)]
    title = f"{args.model} on {device.name}: {args.samples:,} samples, {args.epochs:g} epoch(s)"
    console.print(report.growth_table(title, rows, fixed_batch=args.prompts_per_step is not None))
    if args.plot and best:
        report.plot(best, args.plot, title)
    write_json(args.json, [report.as_json(plan) for plan in best])
    return 0 if best else 1


if __name__ == "__main__":
    sys.exit(main())
