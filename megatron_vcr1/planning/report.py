"""Prints plans as tables that fit into 80 columns, as JSON, and as a plot."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_vcr1.command_line import text_table
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.planning.calibration import Measured, predicted_bytes, predicted_seconds
from megatron_vcr1.planning.devices import Device
from megatron_vcr1.planning.memory import host_memory
from megatron_vcr1.planning.search import Plan, Refusal

LAYOUT = "TP x PP\nx DP"
HYPHENATED = {
    "parameters": "param-\neters",
    "gradients": "gradi-\nents",
    "optimizer": "optim-\nizer",
    "reference": "refer-\nence",
    "activations": "activa-\ntions",
    "old_log_probs": "old\nprobs",
}


def print_plans(console: Console, plans: Sequence[Plan], *, mine: Plan | None = None) -> None:
    """Print time and memory of all plans, then details and settings of the fastest one.

    Args:
        mine: the plan of a configuration, which is shown first and marked with an asterisk.
    """
    best = plans[0]
    job, cluster = best.job, best.cluster
    size = f"{job.prompts_per_step} prompts x {job.group_size} responses per step"
    console.print(f"{cluster.num_gpus} x {cluster.device.name}, {size}, {job.num_steps:,} steps\n")
    shown = [*([mine] if mine else []), *plans]
    console.print(_time_table(shown, mine), "")
    console.print(_memory_table(shown, mine), "")
    if mine is not None:
        console.print("* the configuration as it is\n")
    console.print(_stage_table(best), "")
    traffic = ", ".join(f"{name} {value / 1e9:.2f} GB" for name, value in dataclasses.asdict(best.traffic).items())
    console.print(f"Each GPU sends per step: {traffic}\n")
    console.print(f"{_host_memory(best)}\n")
    if best.layout.replicas > 1:
        console.print(f"FLOPs of the busiest of {best.layout.replicas} replicas: {best.imbalance:.2f} x the mean\n")
    options = " ".join(f"--{key} {value}" for key, value in settings(best).items())
    console.print(f"Settings: {options}\n", soft_wrap=True)  # on one line, so that it can be copied


def print_changes(console: Console, config: RunConfig, best: Plan, mine: Plan | None) -> None:
    """Print which settings of a run the fastest plan changes, and what that gains."""
    is_fastest = mine is not None and mine.time.total <= 1.02 * best.time.total
    target = mine if mine is not None and is_fastest else best
    sections = config.model_dump(mode="json")
    changes = []
    for key, value in settings(target).items():
        section, name = key.split(".")
        now = sections[section][name]
        # A lower fraction than possible only means a smaller KV cache.
        fits = key == "sglang.memory_fraction" and (not config.sglang.colocated or now <= float(value))
        if key == "train.microbatch_tokens" and mine is not None:  # several values give the same microbatches
            fits = mine.layout.groups_per_microbatch == target.layout.groups_per_microbatch
        kept = fits or (is_fastest and key != "sglang.memory_fraction")
        if not kept and _as_text(now) != _as_text(value):
            changes.append(f"  {key} = {_as_text(now)} -> {_as_text(value)}")
    if not changes:
        console.print("The configuration is as fast as the best layout: nothing to change.\n")
    elif is_fastest:
        console.print("\n".join(["The layout is as fast as the best one. For its memory, change", *changes, ""]))
    else:
        gain = "" if mine is None else f": {mine.time.total:.2f} s -> {best.time.total:.2f} s per step"
        console.print("\n".join([f"To get the fastest layout, change{gain}", *changes, ""]), soft_wrap=True)


def _as_text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _name(plan: Plan, mine: Plan | None) -> str:
    return plan.layout.name + ("*" if plan is mine else "")


def _time_table(plans: Sequence[Plan], mine: Plan | None) -> Table:
    names = [phase.name for phase in dataclasses.fields(plans[0].time)]
    phases = [name for name in names if any(getattr(plan.time, name) for plan in plans)]
    heads = [HYPHENATED.get(phase, phase) for phase in phases]
    columns = (LAYOUT, "re-\ncompute", "total", *heads, "bubble", "MFU", "update\nMFU", "GPU-\nhours")
    rows = [
        (
            _name(plan, mine),
            plan.layout.recompute,
            f"{plan.time.total:.2f}",
            *(f"{getattr(plan.time, phase):.2f}" for phase in phases),
            *(f"{100 * share:.0f} %" for share in (plan.bubble, plan.mfu, plan.update_mfu)),
            f"{plan.gpu_hours:,.0f}",
        )
        for plan in plans
    ]
    decode = "decode: video decoding that does not overlap with other phases. " if "decode" in phases else ""
    caption = (
        f"{decode}bubble: idle fraction of the update's pipeline. MFU: FLOPs of the update and of the log-probs before "
        "it, prompts counted once, over the peak of the whole step. update MFU: over the peak of these phases."
    )
    return text_table("Seconds per step, fastest layout first", columns, rows, caption, left_columns=())


def _memory_table(plans: Sequence[Plan], mine: Plan | None) -> Table:
    columns = (LAYOUT, "vision", "groups per\nmicrobatch", "layers of first\n/ last stage", "peak GB", "servers")
    rows = []
    for plan in plans:
        stages = plan.layout.stages(plan.job.config)
        servers = f"TP {plan.engine.ranks}, {100 * plan.engine_memory_fraction:.0f} %"
        layers = f"{stages[0]} / {stages[-1]}"
        groups = str(plan.layout.groups_per_microbatch)
        vision = plan.layout.vision if plan.layout.tensor > 1 else "-"
        rows.append((_name(plan, mine), vision, groups, layers, f"{plan.peak_bytes / 1e9:.0f}", servers))
    caption = (
        "vision: parallel.vision. servers: GPUs per SGLang server, and the fraction of their memory that it can use."
    )
    return text_table("Memory of the same layouts", columns, rows, caption, left_columns=())


def _stage_table(plan: Plan) -> Table:
    parts = [part.name for part in dataclasses.fields(plan.memory[0])]
    heads = [HYPHENATED.get(part, part) for part in parts]
    layers = plan.layout.stages(plan.job.config)
    rows = [
        (
            str(stage),
            str(layers[stage]),
            f"{1e3 * plan.stages[stage]:.0f}",
            *(f"{getattr(memory, part) / 1e9:.1f}" for part in (*parts, "total")),
        )
        for stage, memory in enumerate(plan.memory)
    ]
    title = f"Fastest layout, {plan.layout.name}: ms per microbatch and GB of each stage"
    return text_table(title, ("stage", "layers", "ms", *heads, "total"), rows, left_columns=())


def _host_memory(plan: Plan) -> str:
    fullest = max(host_memory(plan.job, plan.layout, plan.cluster.device), key=lambda stage: stage.total)
    ranks = plan.cluster.used_per_node
    parts = ", ".join(f"{name} {ranks * value / 1e9:.0f}" for name, value in dataclasses.asdict(fullest).items())
    return (
        f"Training keeps up to {ranks * fullest.total / 1e9:.0f} GB in the host memory of a node ({parts} GB), beside "
        "frames and servers"
    )


def settings(plan: Plan) -> dict[str, Any]:
    """Return the configuration keys of a run with this plan."""
    layout, job = plan.layout, plan.job
    keys: dict[str, Any] = {
        "parallel.tensor": layout.tensor,
        "parallel.context": layout.context if layout.context > 1 else None,
        "parallel.pipeline": layout.pipeline,
        "parallel.sequence_parallel": str(layout.sequence_parallel).lower(),
        "parallel.vision": layout.vision if layout.tensor > 1 else None,
        "parallel.first_stage_layers": layout.first_stage_layers,
        "parallel.last_stage_layers": layout.last_stage_layers,
        "recompute.granularity": layout.recompute_section.granularity,
        "recompute.modules": "mlp" if layout.recompute == "mlp" else None,
        "train.prompts_per_step": job.prompts_per_step,
        # With some room: responses of a real run are longer or shorter than the mean.
        "train.microbatch_tokens": layout.groups_per_microbatch * (job.group_tokens + job.group_size),
        "rollout.engine": "sglang",
        "sglang.num_servers": max(1, plan.cluster.used_per_node // plan.engine.ranks),
        "sglang.tensor": plan.engine.ranks,
        "sglang.memory_fraction": f"{plan.engine_memory_fraction - 0.01:.2f}",
    }
    return {key: value for key, value in keys.items() if value is not None}


def refusals_table(refusals: Sequence[Refusal]) -> Table:
    rows = [(f"{refusal.tensor} x {refusal.pipeline}", refusal.reason) for refusal in refusals]
    return text_table("Not possible", ("TP x PP", "reason"), rows, left_columns=(0, 1), wrap=True)


def calibration_table(runs: Sequence[Measured], device: Device) -> Table:
    rates = ", ".join(f"{name} {value:.2f}" for name, value in dataclasses.asdict(device.efficiency).items())
    rows = [
        (
            run.name,
            f"{run.seconds:.2f}",
            f"{predicted_seconds(run, device):.2f}",
            f"{run.peak_bytes / 1e9:.2f}",
            f"{predicted_bytes(run, dataclasses.replace(device, fixed_bytes=run.fixed_bytes)) / 1e9:.2f}",
        )
        for run in runs
    ]
    columns = ("run", "measured\ns", "predicted\ns", "measured\nGB", "predicted\nGB")
    return text_table("Calibration runs", columns, rows, f"Efficiencies: {rates}")


def growth_table(title: str, rows: Sequence[Plan | tuple[int, int, str]], *, fixed_batch: bool) -> Table:
    """Build the table of one plan per cluster size.

    Args:
        rows: plans; or number of GPUs, prompts per step and the reason where no layout can run.
        fixed_batch: whether all sizes have the same number of prompts per step.
    """
    columns = ("GPUs", "prompts\nper step", LAYOUT, "s per\nstep", "steps", "hours", "GPU-\nhours", "relative", "MFU")
    smallest = next((row for row in rows if isinstance(row, Plan)), None)
    cells: list[tuple[str, ...]] = []
    reasons = []
    for row in rows:
        if not isinstance(row, Plan) or smallest is None:
            num_gpus, prompts, reason = row  # type: ignore[misc]
            cells.append((f"{num_gpus:,}", f"{prompts:,}", "-"))
            reasons.append(f"{num_gpus:,} GPUs: {reason}")
            continue
        cells.append(
            (
                f"{row.cluster.num_gpus:,}",
                f"{row.job.prompts_per_step:,}",
                row.layout.name,
                f"{row.time.total:.1f}",
                f"{row.job.num_steps:,}",
                f"{row.hours:.2f}",
                f"{row.gpu_hours:.0f}",
                f"{row.gpu_hours / smallest.gpu_hours:.2f}x",
                f"{100 * row.mfu:.0f} %",
            )
        )
    caption = "relative: GPU-hours relative to the smallest size. " + (
        "All sizes make the same updates."
        if fixed_batch
        else "More prompts per step mean fewer updates: a different training run, not only a faster one."
    )
    return text_table(title, columns, cells, "\n".join([*reasons, caption]), left_columns=())


def plot(plans: Sequence[Plan], path: Path, title: str) -> None:
    """Plot hours and seconds per phase over the number of GPUs.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(11, 4), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    hours, phases = figure.subplots(1, 2)
    gpus = [plan.cluster.num_gpus for plan in plans]
    names = [f"{count:,}" for count in gpus]
    hours.loglog(gpus, [plan.hours for plan in plans], "o-", label="hours")
    hours.loglog(gpus, [plan.gpu_hours for plan in plans], "s--", label="GPU-hours")
    hours.set(xlabel="GPUs", title="one run")
    hours.set_xticks(gpus, names)
    hours.minorticks_off()
    hours.legend()
    bottom = [0.0] * len(plans)
    for phase in dataclasses.fields(plans[0].time):
        seconds = [getattr(plan.time, phase.name) for plan in plans]
        if any(seconds):
            phases.bar(names, seconds, bottom=bottom, label=phase.name)
            bottom = [below + value for below, value in zip(bottom, seconds, strict=True)]
    phases.set(xlabel="GPUs", ylabel="seconds", title="one step")
    phases.legend(loc="upper left", bbox_to_anchor=(1, 1), reverse=True)
    figure.savefig(path, dpi=150)


def as_json(plan: Plan) -> dict[str, Any]:
    return {
        "gpus": plan.cluster.num_gpus,
        "prompts_per_step": plan.job.prompts_per_step,
        "steps": plan.job.num_steps,
        "layout": dataclasses.asdict(plan.layout),
        "settings": settings(plan),
        "memory_bytes": [dataclasses.asdict(stage) | {"total": stage.total} for stage in plan.memory],
        "host_memory_bytes": [
            dataclasses.asdict(stage) | {"total": stage.total}
            for stage in host_memory(plan.job, plan.layout, plan.cluster.device)
        ],
        "engine": dataclasses.asdict(plan.engine),
        "seconds": dataclasses.asdict(plan.time) | {"total": plan.time.total},
        "stage_seconds": plan.stages,
        "bubble": plan.bubble,
        "bytes_sent": dataclasses.asdict(plan.traffic),
        "mfu": plan.mfu,
        "update_mfu": plan.update_mfu,
        "work_imbalance": plan.imbalance,
        "gpu_hours": plan.gpu_hours,
    }
