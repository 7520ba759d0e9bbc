"""train: one GRPO update of this package against the plain transformers computation.

Both sides take the same weights, videos, tokens and advantages, compute the reference's log-probs, the loss with KL and
every gradient. Each runs in processes of its own, in turns; gradients and losses are compared.

"ours" packs a prompt once with its responses. "plain" is what the paper's and many public trainers do: a copy of prompt
and video for every response, logits for the whole sequence, log_softmax and gather. "plain, response logits" spares
logits behind the prompt, as newer ones do (`logits_to_keep`).

Under torchrun every rank computes its share of our update, and nothing is compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from model_presets import add_model_argument, model_config, raw_config
from safetensors import safe_open
from tqdm import tqdm

from megatron_vcr1.config.layout import check_layout
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.flops import Workload, bf16_peak, forward_flops, recomputed_flops, training_flops
from megatron_vcr1.parallel import groups
from throughput.measure import (
    Spread,
    add_json_argument,
    machine,
    matrix_product_rate,
    memory_bytes,
    peak_memory_bytes,
    print_table,
    reset_peak_memory,
    run_again,
    seconds,
    write_json,
)
from throughput.random_weights import write_random_model
from throughput.update_case import UpdateCase

OURS, PLAIN, PLAIN_KEPT = "ours", "plain", "plain, response logits"
SIDES = (OURS, PLAIN, PLAIN_KEPT)
TOLERANCE = 1e-5  # of gradients in float32


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="a GRPO update against the plain transformers computation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_model_argument(parser, default="qwen2.5-vl-3b" if torch.cuda.is_available() else "small")
    sizes = parser.add_argument_group("the update")
    sizes.add_argument("--prompts", type=int, default=1, help="groups of an update (default: %(default)s)")
    sizes.add_argument("--prompt-tokens", type=int, default=1024, help="text and video (default: %(default)s)")
    sizes.add_argument("--group-size", type=int, default=8, help="responses a prompt (default: %(default)s)")
    sizes.add_argument("--response-tokens", type=int, default=64, help="of each response (default: %(default)s)")
    sizes.add_argument("--microbatch-tokens", type=int, default=16384, help="ours (default: %(default)s)")
    sizes.add_argument("--no-reference", action="store_true", help="no reference model and no KL")
    add_layout_arguments(parser)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every side (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=1, help="timed updates a turn, after one that warms up")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU's operators (default: %(default)s)")
    parser.add_argument("--directory", type=Path, help="for weights and gradients (default: for temporary files)")
    add_json_argument(parser)
    parser.add_argument("--worker", nargs=4, metavar=("SIDE", "CASE", "RESULT", "GRADIENTS"), help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    layout = parser.add_argument_group("our layout")
    on_gpu = torch.cuda.is_available()
    layout.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if on_gpu else "float32")
    layout.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks (default: %(default)s)")
    layout.add_argument("--pipeline", type=int, default=1, help="pipeline stages (default: %(default)s)")
    layout.add_argument("--copies", type=int, default=1, help="data-parallel copies (default: %(default)s)")
    layout.add_argument("--sequence-parallel", action="store_true")
    layout.add_argument("--recompute", choices=("none", "selective", "full"), default="none")


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    if args.worker:
        side, case, result_file, gradients = args.worker
        result = work(side, UpdateCase.from_json(Path(case).read_text()), Path(gradients))
        if result is not None:
            Path(result_file).write_text(json.dumps(result))
        return 0
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="benchmark-train-") as folder:
        result = (measure if groups.world_size() == 1 else measure_in_world)(args, Path(folder))
    if result is None:  # another rank reports
        return 0
    write_json(args.json, result)
    report(result)
    return 1 if any(one.get("gradient_difference", 0) > result["tolerance"] for one in result["sides"].values()) else 0


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every side's seconds, memory and difference from ours, in turns."""
    case = _write_case(args, folder)
    config = model_config(case.model_dir)
    num_processes = args.tensor * args.pipeline * args.copies
    check_layout(config.shape, case.run_config.parallel, case.run_config.recompute, num_processes)
    sides = list(dict.fromkeys([OURS, *args.sides]))
    (folder / "case.json").write_text(case.to_json())
    results: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    with tqdm(total=args.rounds * len(sides), desc="turns") as bar:
        for _ in range(args.rounds):
            for side in sides:
                result, gradients = folder / "result.json", folder / f"{side}.safetensors"
                arguments = ["train", "--threads", str(args.threads)]
                arguments += ["--worker", side, str(folder / "case.json"), str(result), str(gradients)]
                run_again(arguments, num_processes=num_processes if side == OURS else 1, threads=args.threads)
                results[side].append(json.loads(result.read_text()))
                bar.update()
    summaries = {side: _summary(results[side]) for side in sides}
    for side in sides[1:]:
        summaries[side] |= _compare(folder / f"{OURS}.safetensors", folder / f"{side}.safetensors")
        summaries[side]["loss_difference"] = abs(summaries[side]["loss"] - summaries[OURS]["loss"])
    return _document(args, case, summaries)


def measure_in_world(args: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """Our side alone, on the ranks that torchrun or srun started; the result is the first rank's."""
    if args.sides != list(SIDES) and args.sides != [OURS]:
        raise UserError("--sides: the plain computation runs in one process; start this without torchrun to compare")
    args.sides = [OURS]
    args.copies = groups.world_size() // (args.tensor * args.pipeline)  # check_layout refuses a rest
    case = _write_case(args, folder)
    config = model_config(case.model_dir)
    check_layout(config.shape, case.run_config.parallel, case.run_config.recompute, groups.world_size())
    result = work(OURS, dataclasses.replace(case, num_updates=args.rounds * args.updates), None)
    return None if result is None else _document(args, case, {OURS: _summary([result])})


def _document(args: argparse.Namespace, case: UpdateCase, sides: dict[str, Any]) -> dict[str, Any]:
    config = model_config(case.model_dir)
    return machine() | {
        "command": " ".join(["benchmark_throughput.py", *sys.argv[1:]]),
        "model": args.model,
        "case": dataclasses.asdict(case) | {"model_dir": args.model, "reference_dir": bool(case.reference_dir)},
        "copies": args.copies,
        "tolerance": TOLERANCE if args.dtype == "float32" else float("inf"),
        "flops": {
            "ours": _flops(case, case.workload(config)),
            "plain": _flops(case, case.plain_workload(config)),
        },
        "sides": sides,
    }


def _write_case(args: argparse.Namespace, folder: Path) -> UpdateCase:
    """The case, with the weights of the policy and the reference written where sides are compared."""
    dtype = getattr(torch, args.dtype)
    raw = {**raw_config(args.model), "torch_dtype": args.dtype}
    model_dirs = [folder / "policy"] if args.no_reference else [folder / "policy", folder / "reference"]
    for seed, model_dir in enumerate(model_dirs):
        if set(args.sides) == {OURS}:  # nothing to agree with: ranks fill their own shards
            model_dir.mkdir()
            (model_dir / "config.json").write_text(json.dumps(raw))
        else:
            write_random_model(model_dir, raw, dtype=dtype, seed=seed)
    return UpdateCase(
        model_dir=str(folder / "policy"),
        reference_dir=None if args.no_reference else str(folder / "reference"),
        dtype=args.dtype,
        num_prompts=args.prompts,
        prompt_tokens=args.prompt_tokens,
        group_size=args.group_size,
        response_tokens=args.response_tokens,
        microbatch_tokens=args.microbatch_tokens,
        tensor=args.tensor,
        pipeline=args.pipeline,
        sequence_parallel=args.sequence_parallel,
        recompute=args.recompute,
        num_updates=args.updates,
    )


def work(side: str, case: UpdateCase, gradients: Path | None) -> dict[str, Any] | None:
    """Build one side, warm it up and time it.

    Returns:
        On the first rank, of every rank's memory and seconds the highest; None on the others.
    """
    libraries = memory_bytes()
    reset_peak_memory()
    if side != OURS:
        from throughput.update_plain import PlainUpdate

        return _time(PlainUpdate(case, full_logits=side == PLAIN), case, libraries, gradients)
    from throughput.update_ours import OurUpdate

    with groups.world(case.run_config.parallel, seed=case.seed):
        every = groups.gather_objects(_time(OurUpdate(case), case, libraries, gradients))
        if not groups.is_first_rank():
            return None
    return every[0] | {
        "seconds": [max(values) for values in zip(*(one["seconds"] for one in every), strict=True)],
        "peak_bytes": max(one["peak_bytes"] for one in every),
        "peak_bytes_by_rank": [one["peak_bytes"] for one in every],
        # Every rank of the last stage has its copy's share of the loss.
        "loss": sum(one["loss"] for one in every) / case.tensor,
    }


def _time(update: Any, case: UpdateCase, libraries_bytes: int, gradients: Path | None) -> dict[str, Any]:
    """One update that warms up, then the timed ones; gradients are those of the last."""
    at_rest = memory_bytes()
    update.run()
    losses: list[float] = []
    took = [seconds(lambda: losses.append(update.run())) for _ in range(case.num_updates)]
    peak = peak_memory_bytes()
    if gradients is not None and groups.world_size() == 1:
        update.save_gradients(gradients)
    return {
        "seconds": took,
        "peak_bytes": peak,
        "at_rest_bytes": at_rest,  # weights, and gradients where a buffer holds them
        "libraries_bytes": libraries_bytes,
        "loss": losses[-1],
        "product_flops_per_s": matrix_product_rate(getattr(torch, case.dtype)),
    }


def _summary(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of all turns of a side: every timed second, the highest memory, the fastest matrix product."""
    took = [value for one in results for value in one["seconds"]]
    highest = {
        key: max(one[key] for one in results)
        for key in ("peak_bytes", "at_rest_bytes", "libraries_bytes", "product_flops_per_s")
    }
    by_rank = {key: results[-1][key] for key in ("peak_bytes_by_rank",) if key in results[-1]}
    return {"seconds": took, **highest, **by_rank, "loss": results[-1]["loss"]}


def _compare(ours: Path, other: Path) -> dict[str, float]:
    """The largest difference of any gradient, and the largest gradient."""
    difference, largest = 0.0, 0.0
    with safe_open(ours, "pt") as mine, safe_open(other, "pt") as theirs:
        if sorted(mine.keys()) != sorted(theirs.keys()):
            raise RuntimeError(f"the sides differ in their gradients' names: {set(mine.keys()) ^ set(theirs.keys())}")
        for name in mine.keys():  # noqa: SIM118  # no mapping
            expected = theirs.get_tensor(name).float()
            difference = max(difference, float((mine.get_tensor(name).float() - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
    return {"gradient_difference": difference, "largest_gradient": largest}


def _flops(case: UpdateCase, work: Workload) -> dict[str, float]:
    """Operations of an update by part: the policy's forward and backward, the reference's forward; and recomputed."""
    config = model_config(case.model_dir)
    total = training_flops(config, work)
    if case.reference_dir:
        total += forward_flops(config, work)
    again = recomputed_flops(config, work, case.run_config.recompute)
    return {**dataclasses.asdict(total), "total": total.total, "recomputed": again.total}


def report(result: dict[str, Any]) -> None:
    """Print the table and what the columns mean."""
    ours, case = result["sides"][OURS], result["case"]
    num_devices = case["tensor"] * case["pipeline"] * result["copies"]
    useful = result["flops"]["ours"]["total"]
    rows = []
    for side, one in result["sides"].items():
        spread = Spread.of(one["seconds"])
        devices = num_devices if side == OURS else 1
        peak = bf16_peak(result["device"]) or one["product_flops_per_s"]
        faster = spread.median / Spread.of(ours["seconds"]).median
        row = [side, spread.text(), f"{1 / faster:.3f}x" if faster < 1 else f"{faster:.1f}x"]
        row += [f"{one['peak_bytes'] / 1e9:.2f}", f"{one['peak_bytes'] / ours['peak_bytes']:.1f}x"]
        row += [f"{100 * useful / spread.median / devices / peak:.1f} %"]
        row += ["-" if side == OURS else f"{one['gradient_difference']:.1e}"]
        rows.append(row)
    operations = result["flops"]["plain"]["total"] / useful
    rows_of = (
        f"{case['num_prompts']} x (prompt {case['prompt_tokens']} + {case['group_size']} x {case['response_tokens']})"
    )
    against = "of the published bfloat16 peak" if bf16_peak(result["device"]) else "of a matrix product's rate"
    print_table(
        f"GRPO update, {result['model']}, {case['dtype']}, {rows_of} tokens, {result['device']}, {result['date']}",
        ("", "seconds", "of ours", "peak GB", "of ours", "MFU", "gradient difference"),
        rows,
        f"median (range) of {len(ours['seconds'])} updates; peak of the process, libraries "
        f"{ours['libraries_bytes'] / 1e9:.2f} GB included. MFU: {useful / 1e12:.3f} TFLOP, prompts counted once, "
        f"{against}; the plain computation does {operations:.1f}x as many. Gradients: largest difference from ours "
        "of any number.",
    )
