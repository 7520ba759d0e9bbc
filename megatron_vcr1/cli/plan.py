"""Defines the arguments of `vcr1 plan`; `megatron_vcr1.planning` does the work."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from megatron_vcr1.cli.arguments import path_argument, positive
from megatron_vcr1.command_line import HelpFormatter, write_json
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.presets import add_model_argument, model_config
from megatron_vcr1.planning.devices import DEVICES, Cluster, Device

if TYPE_CHECKING:  # `vcr1 --help` must not load pydantic
    from rich.console import Console

    from megatron_vcr1.config.schema import RunConfig
    from megatron_vcr1.planning.job import Job
    from megatron_vcr1.planning.search import Plan, Refusal

GROWTH_GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
_DESCRIPTION = """Predict memory, time and cost of a GRPO run on a cluster, for every parallel layout.

    vcr1 plan run.toml --nodes 4 --gpu h100
    vcr1 plan --model qwen2.5-vl-7b --nodes 16 --gpu h100
    vcr1 plan --model qwen2.5-vl-7b --growth --plot growth.png
    vcr1 plan --gpu h200 --calibrate update-1.json update-2.json

With CONFIG.toml, the run's own layout is shown beside the best ones, with the settings to change. Without it, the
defaults describe the paper's joint run: 18,031 samples, 8 responses per prompt, one prompt per GPU and step.

The predictions use the GPUs' published peak rates and assumed efficiencies; --calibrate replaces these by measured
ones."""
_NUMBERS = {
    "--prompts-per-step": "prompts per step (default: one per GPU)",
    "--group-size": "responses per prompt (default: 8)",
    "--samples": "samples per epoch (default: 18031; with CONFIG.toml, those of its manifests)",
    "--prompt-tokens": "text and vision tokens of a prompt (default: 3840; with CONFIG.toml, a video that fills "
    "data.total_pixels)",
}
_MODEL = "qwen2.5-vl-7b"
_PAPER = {"group_size": 8, "samples": 18_031, "prompt_tokens": 3840, "epochs": 1.0, "freeze": (), "reference": "host"}
"""Defaults of the options that describe a run."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `plan` to the `vcr1` command."""
    parser = subparsers.add_parser(
        "plan",
        help="predict memory, time and cost of a run on a cluster",
        description=_DESCRIPTION,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="?", type=path_argument, metavar="CONFIG.toml", help="settings of a run")
    add_model_argument(parser, default=None, default_text=_MODEL)
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("--nodes", type=positive, default=1, metavar="N", help="(default: %(default)s)")
    cluster.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="(default: %(default)s)")
    cluster.add_argument("--gpu", choices=list(DEVICES), default="h100", help="(default: %(default)s)")
    cluster.add_argument(
        "--calibrate",
        nargs="+",
        type=path_argument,
        metavar="JSON",
        help="results of `vcr1 benchmark train --json` on this GPU",
    )
    job = parser.add_argument_group("run")
    for option, text in _NUMBERS.items():
        job.add_argument(option, type=positive, metavar="N", help=text)
    job.add_argument(
        "--response-tokens", type=positive, default=200, metavar="N", help="mean tokens of a response (default: 200)"
    )
    job.add_argument(
        "--longest-response",
        type=positive,
        default=500,
        metavar="N",
        help="tokens of the longest response of a step (default: %(default)s)",
    )
    job.add_argument("--epochs", type=float, metavar="N", help="(default: 1)")
    job.add_argument(
        "--freeze",
        nargs="+",
        choices=("vision_tower", "merger", "language_model"),
        metavar="PART",
        help="parts that are not trained: vision_tower, merger, language_model",
    )
    job.add_argument(
        "--reference",
        choices=("host", "resident", "none"),
        help="where the reference is kept, see grpo.reference (default: host)",
    )
    parser.add_argument("--growth", action="store_true", help="compare the best layouts of 8 to 1,024 GPUs")
    parser.add_argument(
        "--plot", type=path_argument, metavar="PNG", help="with --growth: also draw a plot (needs matplotlib)"
    )
    parser.add_argument("--json", type=path_argument, metavar="FILE", help="also write the plans to a JSON file")
    parser.set_defaults(run=run, takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Print plans; return 1 if no layout can run. Raises UserError for invalid input."""
    from rich.console import Console

    from megatron_vcr1.planning import report
    from megatron_vcr1.planning.calibration import Measured, calibrate

    config = _load(args)
    args.model = args.model or _MODEL
    device = replace(DEVICES[args.gpu], gpus_per_node=args.gpus_per_node)
    console = Console()
    if args.calibrate:
        runs = [Measured.from_file(path) for path in args.calibrate]
        device = calibrate(device, runs)
        console.print(report.calibration_table(runs, device), "")
    else:
        console.print("Based on published peak rates and assumed efficiencies; --calibrate uses measured ones.\n")
    if config is not None:
        return _plan_run(args, config, device, console)
    if args.growth:
        return _growth(args, device, console)
    from megatron_vcr1.planning.search import search

    num_gpus = args.nodes * args.gpus_per_node
    job = _paper_job(args, args.prompts_per_step or num_gpus)
    plans, refusals = search(job, Cluster(device, num_gpus), args.longest_response)
    if plans:
        report.print_plans(console, plans)
    return _finish(args, device, console, plans, refusals, {})


def _load(args: argparse.Namespace) -> RunConfig | None:
    """Load CONFIG.toml, if there is one. Raises UserError for options that it excludes."""
    described = ["model", "prompts_per_step", "group_size", "epochs", "freeze", "reference", "plot"]
    if args.config is None:
        if args.plot is not None and not args.growth:
            raise UserError("--plot: draws the comparison of --growth: add --growth, or leave --plot out")
        if args.overrides:
            raise UserError(f"{args.overrides[0]}: settings can be overridden only with a CONFIG.toml")
        return None
    if given := [name for name in described if getattr(args, name) is not None] + ["growth"] * args.growth:
        raise UserError(f"--{given[0].replace('_', '-')}: leave it out: CONFIG.toml describes the run")
    from megatron_vcr1.config.loading import load_config

    config = load_config(args.config, args.overrides)
    if args.samples is not None and config.train.num_steps is not None:
        raise UserError("--samples: leave it out: train.num_steps sets the length of the run")
    return config


def _plan_run(args: argparse.Namespace, config: RunConfig, device: Device, console: Console) -> int:
    """Print the plan of a run's own layout, the alternatives, and the settings that would change."""
    from megatron_vcr1.model.config import ModelConfig
    from megatron_vcr1.planning import report
    from megatron_vcr1.planning.run_job import job_of_run, layout_of_run
    from megatron_vcr1.planning.search import Plan, evaluate, search

    if config.train.stage != "grpo":
        raise UserError("train.stage: only GRPO runs can be planned; `vcr1 config --check` estimates the memory of SFT")
    if problem := _without_colocated_servers(config):
        raise UserError(
            f"{problem}: only runs with SGLang servers on the GPUs of training can be planned; `vcr1 config --check` "
            "estimates the memory of training"
        )
    num_gpus = args.nodes * args.gpus_per_node
    cluster = Cluster(device, num_gpus)
    job = _checked(
        job_of_run(
            config,
            ModelConfig.from_pretrained(config.model.path),
            response_tokens=min(args.response_tokens, config.rollout.max_new_tokens),
            prompt_tokens=args.prompt_tokens,
            num_samples=args.samples,
        )
    )
    longest = min(args.longest_response, config.rollout.max_new_tokens)
    plans, refusals = search(job, cluster, longest)
    mine, reason = None, ""
    try:
        own = evaluate(job, layout_of_run(config, job, num_gpus), cluster, longest)
    except UserError as error:
        reason = str(error)
    else:
        if isinstance(own, Plan):
            mine = own
        else:
            reason = own.reason
    if plans:
        report.print_plans(console, plans, mine=mine)
        report.print_changes(console, config, plans[0], mine)
    if mine is None:
        print(f"vcr1: {args.config} cannot run on {num_gpus} {device.name}: {reason}", file=sys.stderr)
    extra = {"configured": None if mine is None else report.as_json(mine), "configured_refused": reason or None}
    code = _finish(args, device, console, plans, refusals, extra)
    return 1 if mine is None else code


def _without_colocated_servers(config: RunConfig) -> str:
    """Return the setting that gives a run another engine than servers on the GPUs of training; "" if there is none."""
    if config.rollout.engine != "sglang":
        return f'rollout.engine = "{config.rollout.engine}"'
    if config.sglang.urls:
        return "sglang.urls"
    return "" if config.sglang.colocated else "sglang.colocated = false"


def _finish(
    args: argparse.Namespace,
    device: Device,
    console: Console,
    plans: list[Plan],
    refusals: list[Refusal],
    extra: dict[str, Any],
) -> int:
    """Print the refused layouts, write the JSON file and return the exit code."""
    from megatron_vcr1.planning import report

    if refusals:
        console.print(report.refusals_table(refusals))
    document = {
        "device": asdict(device),
        **extra,
        "plans": [report.as_json(plan) for plan in plans],
        "refused": [asdict(refusal) for refusal in refusals],
    }
    write_json(args.json, document)
    if not plans:
        num_gpus = args.nodes * args.gpus_per_node
        print(f"vcr1: no layout of {num_gpus} {device.name} can run this; see the reasons", file=sys.stderr)
    return 0 if plans else 1


def _paper_job(args: argparse.Namespace, prompts_per_step: int) -> Job:
    """Return the job that the options describe; the paper's joint run where they are not given."""
    from megatron_vcr1.planning.job import Job

    given = {name: getattr(args, name) for name in _PAPER if getattr(args, name) is not None}
    options = {**_PAPER, **given}
    return _checked(
        Job(
            config=model_config(args.model),
            prompts_per_step=prompts_per_step,
            group_size=options["group_size"],
            prompt_tokens=options["prompt_tokens"],
            response_tokens=args.response_tokens,
            num_samples=options["samples"],
            num_epochs=options["epochs"],
            freeze=tuple(options["freeze"]),
            with_reference=options["reference"] != "none",
            reference_resident=options["reference"] == "resident",
        )
    )


def _checked(job: Job) -> Job:
    try:
        job.prompt()  # a prompt that is too short for a video is an error
    except ValueError as error:
        raise UserError(f"--prompt-tokens: {error}") from None
    return job


def _growth(args: argparse.Namespace, device: Device, console: Console) -> int:
    """Print the best layout of every cluster size, with one prompt per GPU and step or with a fixed number."""
    from tqdm import tqdm

    from megatron_vcr1.planning import report
    from megatron_vcr1.planning.search import Plan, search

    rows: list[Plan | tuple[int, int, str]] = []
    for num_gpus in tqdm(GROWTH_GPUS, desc="cluster sizes", leave=False):
        job = _paper_job(args, args.prompts_per_step or num_gpus)
        plans, refusals = search(job, Cluster(device, num_gpus), args.longest_response)
        rows.append(plans[0] if plans else (num_gpus, job.prompts_per_step, refusals[0].reason))
    best = [row for row in rows if isinstance(row, Plan)]
    title = f"{args.model} on {device.name}: {job.num_samples:,} samples, {job.num_epochs:g} epoch(s)"
    console.print(report.growth_table(title, rows, fixed_batch=args.prompts_per_step is not None))
    if args.plot and best:
        report.plot(best, args.plot, title)
    write_json(args.json, [report.as_json(plan) for plan in best])
    return 0 if best else 1
