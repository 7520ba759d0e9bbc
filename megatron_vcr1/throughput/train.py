"""Compare one GRPO update of this package with the plain transformers computation.

All sides use the same weights, videos, tokens and advantages. They compute the log-probs of the reference, the loss
with KL, all gradients, their norm, and a step of Adam. Each side runs in processes of its own: once to measure its
memory and to compare gradients, then in turns to measure its time.

"ours" packs a prompt once with its responses. "plain" is what the paper's and many public trainers do: every response
repeats the prompt and the video, logits are computed for the whole sequence, then log_softmax and gather. "plain,
response logits" skips the logits of the prompt, as newer trainers do (`logits_to_keep`). "trl" is TRL's GRPOTrainer, if
it is installed, from the reference's forward pass on.

Under torchrun, every rank computes its part of our update, and nothing is compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm import tqdm

from megatron_vcr1.command_line import positive, write_json
from megatron_vcr1.config.layout import check_layout
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.flops import Workload, bf16_peak, forward_flops, recomputed_flops, training_flops
from megatron_vcr1.model.presets import model_config, raw_config
from megatron_vcr1.parallel import mesh
from megatron_vcr1.throughput.arguments import add_layout_arguments, add_repetition_arguments, add_size_arguments
from megatron_vcr1.throughput.measure import Spread, print_table, provenance, run_again
from megatron_vcr1.throughput.random_weights import write_random_model
from megatron_vcr1.throughput.train_worker import OURS, PLAIN, PLAIN_KEPT, TRL, run_side
from megatron_vcr1.throughput.update_case import UpdateCase

HELP = "a GRPO update, compared with the plain transformers computation"
SIDES = (OURS, PLAIN, PLAIN_KEPT, TRL)
TOLERANCE = 1e-5  # of gradients in float32
# Makes glibc return freed tensors to the system at once: then the peak of the process is the peak of live memory.
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_size_arguments(parser, prompts=1, response_tokens=64)
    parser.add_argument(
        "--microbatch-tokens", type=positive, default=16384, metavar="N", help="of our side (default: %(default)s)"
    )
    parser.add_argument(
        "--reference",
        choices=("host", "resident", "none"),
        default="host",
        help="of our side, see grpo.reference; none: no KL on any side (default: %(default)s)",
    )
    add_layout_arguments(parser)
    parser.add_argument(
        "--context", type=positive, default=1, metavar="N", help="context-parallel ranks of our model (default: 1)"
    )
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=SIDES,
        metavar="SIDE",
        help=f"any of {', '.join(map(repr, SIDES))} (default: all that are installed)",
    )
    add_repetition_arguments(parser, rounds=3)
    parser.add_argument(
        "--updates",
        type=positive,
        default=1,
        dest="num_updates",
        metavar="N",
        help="measured updates per round and side, after a warm-up update (default: %(default)s)",
    )
    parser.add_argument("--profile", type=Path, metavar="DIR", help="also profile one more update of our side")
    parser.add_argument("--worker", nargs=4, metavar=("SIDE", "CASE", "RESULT", "GRADIENTS"), help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    if args.worker:
        side, case, result_file, gradients = args.worker
        update = UpdateCase.from_json(Path(case).read_text())
        result = run_side(side, update, Path(gradients) if gradients else None, args.profile)
        if result is not None:
            Path(result_file).write_text(json.dumps(result))
        return 0
    args.sides = sides_to_compare(args.sides)
    with tempfile.TemporaryDirectory(prefix="benchmark-train-") as folder:
        result = (measure if mesh.launched_world_size() == 1 else measure_in_job)(args, Path(folder))
    if result is None:  # the first rank reports
        return 0
    write_json(args.json, result)
    report(result)
    differences = [side.get("gradient_difference", 0.0) for side in result["sides"].values()]
    return 1 if result["tolerance"] is not None and max(differences) > result["tolerance"] else 0


def sides_to_compare(chosen: Sequence[str] | None) -> list[str]:
    """Return our side, then the chosen sides or all that are available; under torchrun only ours is available.

    Raises:
        UserError: a chosen side is not available.
    """
    in_job = mesh.launched_world_size() > 1
    if chosen is not None and in_job and set(chosen) != {OURS}:
        raise UserError("--sides: the other sides run in one process; start this without torchrun to compare them")
    has_trl = importlib.util.find_spec("trl") is not None
    if chosen is not None and TRL in chosen and not has_trl:
        raise UserError("--sides trl: TRL is not installed; pip install -e '.[peers]'")
    available = [OURS] if in_job else [side for side in SIDES if side != TRL or has_trl]
    return list(dict.fromkeys([OURS, *(available if chosen is None else chosen)]))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure memory and gradients of every side first, then their seconds in turns; each run is a new process."""
    case = _write_case(args, folder)
    config = model_config(case.model_dir)
    num_processes = args.tensor * args.context * args.pipeline * args.replicas
    check_layout(config.shape, case.run_config.parallel, case.run_config.recompute, num_processes)
    (folder / "case.json").write_text(case.to_json())
    result_file = folder / "result.json"
    with tqdm(total=(1 + args.rounds) * len(args.sides) + bool(args.profile), desc="runs") as bar:

        def run_process(side: str, environment: Mapping[str, str], gradients: str, *options: str) -> dict[str, Any]:
            worker = ["--worker", side, str(folder / "case.json"), str(result_file), gradients, *options]
            run_again(
                ["train", "--threads", str(args.threads), *worker],
                num_processes=num_processes if side == OURS else 1,
                threads=args.threads,
                environment=environment,
            )
            bar.update()
            return json.loads(result_file.read_text())

        compares = len(args.sides) > 1
        memory = {side: run_process(side, EXACT_MEMORY, str(folder / side) if compares else "") for side in args.sides}
        timed: dict[str, list[dict[str, Any]]] = {side: [] for side in args.sides}
        for _ in range(args.rounds):
            for side in args.sides:
                timed[side].append(run_process(side, {}, ""))
        if args.profile:
            run_process(OURS, {}, "", "--profile", str(args.profile))
    summaries = {side: _summary(memory[side], timed[side]) for side in args.sides}
    for side in args.sides[1:]:
        summaries[side] |= compare_gradients(folder / OURS, folder / side)
        summaries[side]["loss_difference"] = abs(summaries[side]["loss"] - summaries[OURS]["loss"])
    return _document(args, case, summaries)


def measure_in_job(args: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """Measure our side on the ranks of torchrun or srun. The first rank returns the result, the others None."""
    # check_layout rejects a remainder.
    args.replicas = mesh.launched_world_size() // (args.tensor * args.context * args.pipeline)
    case = _write_case(args, folder)
    config = model_config(case.model_dir)
    check_layout(config.shape, case.run_config.parallel, case.run_config.recompute, mesh.launched_world_size())
    case = dataclasses.replace(case, num_updates=args.rounds * args.num_updates)
    result = run_side(OURS, case, None, args.profile)
    return None if result is None else _document(args, case, {OURS: _summary(result, [result])})


def _document(args: argparse.Namespace, case: UpdateCase, sides: dict[str, Any]) -> dict[str, Any]:
    config = model_config(case.model_dir)
    return provenance(args) | {
        "model": args.model,
        "case": dataclasses.asdict(case) | {"model_dir": args.model, "reference_dir": bool(case.reference_dir)},
        "replicas": args.replicas,
        "tolerance": TOLERANCE if args.dtype == "float32" else None,
        "flops": {
            "ours": _flops(case, case.workload(config)),
            "plain": _flops(case, case.plain_workload(config)),
        },
        "sides": sides,
    }


def _write_case(args: argparse.Namespace, folder: Path) -> UpdateCase:
    """Write the models of the policy and the reference, and return the case.

    Weights are written only if sides are compared. Otherwise the ranks of our side initialize their own shards.
    """
    with_reference = args.reference != "none"
    raw = {**raw_config(args.model), "torch_dtype": args.dtype}
    for seed, name in enumerate(("policy", "reference")[: 1 + with_reference]):
        if args.sides == [OURS]:
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps(raw))
        else:
            write_random_model(folder / name, raw, dtype=getattr(torch, args.dtype), seed=seed)
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(UpdateCase) if field.name in args}
    return UpdateCase(
        **given
        | {
            "model_dir": str(folder / "policy"),
            "reference_dir": str(folder / "reference") if with_reference else None,
            "reference": "resident" if args.reference == "resident" else "host",
        }
    )


def _summary(memory: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Combine the memory of the run that measured it, the seconds of all timed runs, and their fastest matmul."""
    kept = ("peak_bytes", "peak_bytes_by_rank", "at_rest_bytes", "libraries_bytes", "loss", "notes")
    times = {key: [value for run in runs for value in run[key]] for key in ("seconds", "cpu_seconds")}
    rate = max(run["matmul_flops_per_s"] for run in runs)
    return {**times, **{key: memory[key] for key in kept if key in memory}, "matmul_flops_per_s": rate}


def compare_gradients(ours: Path, other: Path) -> dict[str, float]:
    """Return the largest difference of any gradient, and the largest gradient.

    Raises:
        RuntimeError: the files have gradients of different names.
    """
    difference, largest = 0.0, 0.0
    with safe_open(ours, "pt") as mine, safe_open(other, "pt") as theirs:
        if sorted(mine.keys()) != sorted(theirs.keys()):
            names = set(mine.keys()) ^ set(theirs.keys())
            raise RuntimeError(f"only one of the sides has gradients of these names: {names}")
        for name in mine.keys():  # noqa: SIM118  # not a mapping
            expected = theirs.get_tensor(name).float()
            difference = max(difference, float((mine.get_tensor(name).float() - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
    return {"gradient_difference": difference, "largest_gradient": largest}


def _flops(case: UpdateCase, work: Workload) -> dict[str, float]:
    """Return FLOPs of an update by part (policy forward and backward, reference forward), and recomputed FLOPs."""
    config = model_config(case.model_dir)
    total = training_flops(config, work)
    if case.reference_dir:
        total += forward_flops(config, work)
    recomputed = recomputed_flops(config, work, case.run_config.recompute)
    return {**dataclasses.asdict(total), "total": total.total, "recomputed": recomputed.total}


def report(result: dict[str, Any]) -> None:
    ours, case = result["sides"][OURS], result["case"]
    num_devices = case["tensor"] * case["context"] * case["pipeline"] * result["replicas"]
    flops, peak = result["flops"], bf16_peak(result["device"])
    useful = flops["ours"]["total"]
    hardware = useful + flops["ours"]["recomputed"]
    # On a CPU that other programs use too, compare CPU time.
    clock = "seconds" if peak else "cpu_seconds"
    rows = []
    for name, side in result["sides"].items():
        spread = Spread.of(side[clock])
        devices = num_devices if name == OURS else 1
        # Fraction of the peak per FLOP of the update.
        rate = 1 / spread.median / devices / (peak or side["matmul_flops_per_s"])
        above, ours_above = (measured["peak_bytes"] - measured["libraries_bytes"] for measured in (side, ours))
        rows.append(
            (
                name,
                Spread.of(side["seconds"]).text(),
                Spread.of(side["cpu_seconds"]).text(),
                f"{spread.median / Spread.of(ours[clock]).median:.1f}",
                f"{side['peak_bytes'] / 1e9:.2f}",
                f"{side['peak_bytes'] / ours['peak_bytes']:.1f} ({above / ours_above:.1f})",
                f"{100 * useful * rate:.1f} %",
                f"{100 * hardware * rate:.1f} %" if name == OURS else "-",
                "-" if name == OURS else f"{side['gradient_difference']:.1e}",
            )
        )
    sizes = f"{case['num_prompts']} x ({case['prompt_tokens']} + {case['group_size']} x {case['response_tokens']})"
    print_table(
        f"GRPO update, {result['model']}, {case['dtype']}, {sizes} tokens, {result['device']}, {result['date']}",
        ("", "seconds", "CPU seconds", "x ours", "peak GB", "x ours", "MFU", "hardware", "gradients"),
        rows,
        f"Median (range) of {len(ours['seconds'])} updates. Peak memory of the {'allocator' if peak else 'process'}; "
        f"in brackets, the ratio without {ours['libraries_bytes'] / 1e9:.2f} GB of libraries. MFU: {useful / 1e12:.3f} "
        f"TFLOP, with each prompt counted once, at the {'published bfloat16' if peak else 'measured matmul'} rate; "
        f"plain computes {flops['plain']['total'] / useful:.1f} times as many. hardware: MFU with the FLOPs that "
        "our side recomputes. gradients: largest difference from ours.",
    )
