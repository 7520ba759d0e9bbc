#!/usr/bin/env python3
"""What a GRPO run needs and costs on a cluster, for every layout, before it is paid for.

    python tools/plan_cluster.py --model qwen2.5-vl-7b --nodes 16 --gpu h100
    python tools/plan_cluster.py --model qwen2.5-vl-7b --growth --plot growth.png
    python tools/plan_cluster.py --gpu h200 --calibrate update-1.json update-2.json

Defaults are the paper's joint run: 18,031 samples, 8 responses a prompt, one prompt a GPU and step. Rates are published
peaks times assumed efficiencies, unless --calibrate gives results of benchmark_throughput.py train.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster_plan.calibration import Measured, calibrate, predicted_bytes, predicted_seconds
from cluster_plan.devices import DEVICES, Device
from cluster_plan.job import Job
from cluster_plan.search import Cluster, Plan, Refusal, search
from model_presets import add_model_argument, model_config
from rich.console import Console
from rich.table import Table
from tables import frameless
from tqdm import tqdm

from megatron_vcr1.errors import UserError

HYPHENATED = {
    "parameters": "param-\neters",
    "gradients": "gradi-\nents",
    "optimizer": "optim-\nizer",
    "reference": "refer-\nence",
    "activations": "activa-\ntions",
}
GROWTH_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        return run(args)
    except UserError as error:
        print(f"plan_cluster: error: {error}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_model_argument(parser, default="qwen2.5-vl-7b")
    cluster = parser.add_argument_group("the cluster")
    cluster.add_argument("--nodes", type=_positive, default=1, help="(default: %(default)s)")
    cluster.add_argument("--gpus-per-node", type=_positive, default=8, help="(default: %(default)s)")
    cluster.add_argument("--gpu", choices=list(DEVICES), default="h100", help="(default: %(default)s)")
    cluster.add_argument(
        "--calibrate", nargs="+", type=Path, metavar="JSON", help="results of benchmark_throughput.py train on this GPU"
    )
    job = parser.add_argument_group("the run")
    job.add_argument("--prompts-per-step", type=_positive, help="(default: one a GPU)")
    job.add_argument("--group-size", type=_positive, default=8, help="responses a prompt (default: %(default)s)")
    job.add_argument("--prompt-tokens", type=_positive, default=3840, help="text and video (default: %(default)s)")
    job.add_argument("--response-tokens", type=_positive, default=200, help="mean of a response (default: %(default)s)")
    job.add_argument("--longest-response", type=_positive, default=500, help="of a step (default: %(default)s)")
    job.add_argument("--samples", type=_positive, default=18_031, help="of an epoch (default: %(default)s)")
    job.add_argument("--epochs", type=float, default=1.0, help="(default: %(default)s)")
    job.add_argument("--freeze", nargs="+", default=(), choices=("vision_tower", "merger", "language_model"))
    job.add_argument(
        "--reference", choices=("swap", "resident", "none"), default="swap", help="as grpo.reference (default: swap)"
    )
    parser.add_argument("--growth", action="store_true", help="the best layout of 8 to 1,024 GPUs")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="with --growth: draw it (needs matplotlib)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to FILE")
    return parser


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def run(args: argparse.Namespace) -> int:
    device = DEVICES[args.gpu]
    console = Console()
    if args.calibrate:
        runs = [Measured.from_file(path) for path in args.calibrate]
        device = calibrate(device, runs)
        console.print(_calibration_table(runs, device))
    else:
        console.print("Rates are published peaks times assumed efficiencies; --calibrate takes measured ones.")
    if args.growth:
        return _growth(args, device, console)
    num_gpus = args.nodes * args.gpus_per_node
    job = _job(args, args.prompts_per_step or num_gpus)
    plans, refusals = search(job, Cluster(device, num_gpus, args.gpus_per_node), args.longest_response)
    if plans:
        _print_plans(console, plans, device)
    if refusals:
        console.print(_refusals_table(refusals))
    if args.json:
        args.json.write_text(json.dumps(_document(plans, refusals, device), indent=1) + "\n")
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
        job.prompt()
    except ValueError as error:
        raise UserError(f"--prompt-tokens: {error}") from None
    return job


def _growth(args: argparse.Namespace, device: Device, console: Console) -> int:
    """The best layout of every size, with as many prompts a step as GPUs, or a fixed number."""
    table = _table(
        f"{args.model} on {device.name}: {args.samples:,} samples, {args.epochs:g} epoch(s)",
        ("GPUs", "prompts\na step", "TP x PP\nx copies", "s a step", "steps", "hours", "GPU-hours", "of 8", "MFU"),
        "More prompts a step are fewer updates in the run: another run, if a faster one."
        if args.prompts_per_step is None
        else "The same updates on every size.",
    )
    best: list[Plan] = []
    for num_gpus in tqdm(GROWTH_GPUS, desc="sizes", leave=False):
        job = _job(args, args.prompts_per_step or num_gpus)
        plans, refusals = search(job, Cluster(device, num_gpus, args.gpus_per_node), args.longest_response)
        if not plans:
            table.add_row(str(num_gpus), str(job.prompts_per_step), refusals[0].reason, *[""] * 6)
            continue
        plan = plans[0]
        best.append(plan)
        table.add_row(
            f"{num_gpus:,}",
            f"{job.prompts_per_step:,}",
            _division(plan),
            f"{plan.time.total:.1f}",
            f"{job.num_steps:,}",
            f"{plan.hours:.2f}",
            f"{plan.gpu_hours:.0f}",
            f"{plan.gpu_hours / best[0].gpu_hours:.2f}x",
            f"{100 * plan.utilisation:.0f} %",
        )
    console.print(table)
    if args.plot:
        _plot(best, args.plot, str(table.title))
    if args.json:
        args.json.write_text(json.dumps([_row(plan) for plan in best], indent=1) + "\n")
    return 0 if best else 1


def _plot(plans: Sequence[Plan], path: Path, title: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib; pip install matplotlib") from None
    figure = Figure(figsize=(11, 4), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    hours, phases = figure.subplots(1, 2)
    gpus = [plan.cluster.num_gpus for plan in plans]
    hours.loglog(gpus, [plan.hours for plan in plans], "o-", label="hours")
    hours.loglog(gpus, [plan.gpu_hours for plan in plans], "s--", label="GPU-hours")
    names = [f"{count:,}" for count in gpus]
    hours.set(xlabel="GPUs", title="one run")
    hours.set_xticks(gpus, names)
    hours.minorticks_off()
    hours.legend()
    below = [0.0] * len(plans)
    for phase in dataclasses.fields(plans[0].time):
        seconds = [getattr(plan.time, phase.name) for plan in plans]
        if not any(seconds):
            continue
        phases.bar(names, seconds, bottom=below, label=phase.name)
        below = [one + other for one, other in zip(below, seconds, strict=True)]
    phases.set(xlabel="GPUs", ylabel="seconds", title="one step")
    phases.legend(loc="upper left", bbox_to_anchor=(1, 1), reverse=True)
    figure.savefig(path, dpi=150)


def _division(plan: Plan) -> str:
    layout = plan.layout
    return f"{layout.tensor} x {layout.pipeline} x {layout.copies}"


def _table(title: str, columns: Sequence[str], caption: str | None = None) -> Table:
    """Numbers to the right."""
    table = frameless(title, caption)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _print_plans(console: Console, plans: Sequence[Plan], device: Device) -> None:
    """Time and memory of every layout, then what the fastest takes and the settings that ask for it."""
    best, job = plans[0], plans[0].job
    batch = f"{job.prompts_per_step} prompts x {job.group_size} responses a step"
    console.print(f"{best.cluster.num_gpus} x {device.name}, {batch}, {job.num_steps:,} steps\n")
    console.print(_time_table(plans), "")
    console.print(_memory_table(plans), "")
    console.print(_best_table(best), "")
    traffic = ", ".join(f"{name} {value / 1e9:.2f} GB" for name, value in dataclasses.asdict(best.traffic).items())
    console.print(f"A GPU sends in a step: {traffic}\n")
    options = " ".join(f"--{key} {value}" for key, value in _settings(best).items())
    console.print(f"Settings: {options}\n", soft_wrap=True)  # to be copied


def _time_table(plans: Sequence[Plan]) -> Table:
    names = [one.name for one in dataclasses.fields(plans[0].time)]
    phases = [name for name in names if any(getattr(plan.time, name) for plan in plans)]
    heads = [HYPHENATED.get(phase, phase) for phase in phases]
    table = _table(
        "Seconds a step, the fastest first",
        ("TP x PP\nx copies", "re-\ncompute", "all", *heads, "bubble", "MFU", "update\nMFU", "GPU-\nhours"),
        "decode: what nothing hides. bubble: of the update's pipeline. MFU: of reference and update, prompts counted "
        "once, over the whole step; update MFU: over these two phases.",
    )
    for plan in plans:
        table.add_row(
            _division(plan),
            plan.layout.recompute,
            f"{plan.time.total:.2f}",
            *(f"{getattr(plan.time, phase):.2f}" for phase in phases),
            *(f"{100 * share:.0f} %" for share in (plan.bubble, plan.utilisation, plan.update_utilisation)),
            f"{plan.gpu_hours:,.0f}",
        )
    return table


def _memory_table(plans: Sequence[Plan]) -> Table:
    table = _table(
        "Their memory",
        ("TP x PP\nx copies", "groups a\nmicrobatch", "layers of the\nfirst / last stage", "peak GB", "servers"),
        "servers: GPUs of one SGLang server, and the share of their memory that it can have.",
    )
    for plan in plans:
        stages = plan.layout.stages(plan.job.config)
        table.add_row(
            _division(plan),
            str(plan.layout.groups_per_microbatch),
            f"{stages[0]} / {stages[-1]}",
            f"{plan.peak_bytes / 1e9:.0f}",
            f"TP {plan.engine.ranks}, {100 * plan.engine_memory_fraction:.0f} %",
        )
    return table


def _best_table(plan: Plan) -> Table:
    """Memory of every stage."""
    parts = [one.name for one in dataclasses.fields(plan.memory[0])]
    heads = [HYPHENATED.get(part, part) for part in parts]
    table = _table(
        f"Gigabytes of the fastest, {_division(plan)}; ms: of a microbatch", ("stage", "layers", "ms", *heads, "total")
    )
    layers = plan.layout.stages(plan.job.config)
    for stage, memory in enumerate(plan.memory):
        numbers = [f"{getattr(memory, part) / 1e9:.1f}" for part in (*parts, "total")]
        table.add_row(str(stage), str(layers[stage]), f"{1e3 * plan.stages[stage]:.0f}", *numbers)
    return table


def _settings(plan: Plan) -> dict[str, Any]:
    """The keys of a run's configuration that this plan stands for."""
    layout, job = plan.layout, plan.job
    keys: dict[str, Any] = {
        "parallel.tensor": layout.tensor,
        "parallel.pipeline": layout.pipeline,
        "parallel.sequence_parallel": str(layout.sequence_parallel).lower(),
        "parallel.first_stage_layers": layout.first_stage_layers,
        "parallel.last_stage_layers": layout.last_stage_layers,
        "recompute.granularity": layout.recompute_section.granularity,
        "recompute.modules": "mlp" if layout.recompute == "mlp" else None,
        "train.prompts_per_step": job.prompts_per_step,
        "train.microbatch_tokens": layout.groups_per_microbatch * (job.group_rows + job.group_size),
        "rollout.engine": "sglang",
        "sglang.num_servers": max(1, min(plan.cluster.gpus_per_node, plan.cluster.num_gpus) // plan.engine.ranks),
        "sglang.tensor": plan.engine.ranks,
        "sglang.memory_fraction": f"{plan.engine_memory_fraction - 0.01:.2f}",
    }
    return {key: value for key, value in keys.items() if value is not None}


def _refusals_table(refusals: Sequence[Refusal]) -> Table:
    table = frameless("Ruled out")
    table.add_column("TP x PP", no_wrap=True)
    table.add_column("why")
    for one in refusals:
        table.add_row(f"{one.tensor} x {one.pipeline}", one.reason)
    return table


def _calibration_table(runs: Sequence[Measured], device: Device) -> Table:
    rates = ", ".join(f"{name} {value:.2f}" for name, value in dataclasses.asdict(device.efficiency).items())
    table = Table(title="Measured and predicted", caption=f"Efficiencies: {rates}", title_justify="left")
    for column in ("", "s", "predicted", "GB", "predicted"):
        table.add_column(column, justify="right" if column else "left")
    for one in runs:
        on_its_machine = replace(device, fixed_bytes=one.fixed_bytes)
        table.add_row(
            one.name,
            f"{one.seconds:.2f}",
            f"{predicted_seconds(one, device):.2f}",
            f"{one.peak_bytes / 1e9:.2f}",
            f"{predicted_bytes(one, on_its_machine) / 1e9:.2f}",
        )
    return table


def _row(plan: Plan) -> dict[str, Any]:
    layout = dataclasses.asdict(plan.layout)
    return {
        "gpus": plan.cluster.num_gpus,
        "prompts_per_step": plan.job.prompts_per_step,
        "steps": plan.job.num_steps,
        "layout": layout,
        "settings": _settings(plan),
        "memory_bytes": [dataclasses.asdict(one) | {"total": one.total} for one in plan.memory],
        "engine": dataclasses.asdict(plan.engine),
        "seconds": dataclasses.asdict(plan.time) | {"total": plan.time.total},
        "stage_seconds": plan.stages,
        "bubble": plan.bubble,
        "bytes_sent": dataclasses.asdict(plan.traffic),
        "mfu": plan.utilisation,
        "update_mfu": plan.update_utilisation,
        "gpu_hours": plan.gpu_hours,
    }


def _document(plans: Sequence[Plan], refusals: Sequence[Refusal], device: Device) -> dict[str, Any]:
    return {
        "device": dataclasses.asdict(device),
        "plans": [_row(plan) for plan in plans],
        "refused": [dataclasses.asdict(one) for one in refusals],
    }


if __name__ == "__main__":
    sys.exit(main())
