"""train: one GRPO update of this package against the plain transformers computation.

Both sides take the same weights, videos, tokens and advantages, compute the reference's log-probs, the loss with KL,
every gradient, their norm, and a step of Adam. Each runs in processes of its own: once for its memory and gradients,
which are compared, then in turns for its time.

"ours" packs a prompt once with its responses. "plain" is what the paper's and many public trainers do: a copy of prompt
and video for every response, logits for the whole sequence, log_softmax and gather. "plain, response logits" spares
logits behind the prompt, as newer ones do (`logits_to_keep`). "trl" is GRPOTrainer of TRL, where that is installed,
from the reference's pass on: it carries a video as a picture of several frames, and the model gets it as a video.

Under torchrun every rank computes its share of our update, and nothing is compared.
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
import torch.distributed as dist
from cluster_plan.job import RECOMPUTES
from model_presets import add_model_argument, model_config, raw_config
from safetensors import safe_open
from tqdm import tqdm

from megatron_vcr1.config.layout import check_layout
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.flops import Workload, bf16_peak, forward_flops, recomputed_flops, training_flops
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.training.profiling import profiled
from throughput.measure import (
    Spread,
    add_json_argument,
    command_line,
    machine,
    matrix_product_rate,
    memory_bytes,
    peak_memory_bytes,
    print_table,
    prompt_tokens,
    reset_peak_memory,
    run_again,
    timed,
    write_json,
)
from throughput.random_weights import write_random_model
from throughput.update_case import UpdateCase

OURS, PLAIN, PLAIN_KEPT, TRL = "ours", "plain", "plain, response logits", "trl"
SIDES = (OURS, PLAIN, PLAIN_KEPT, TRL)
TOLERANCE = 1e-5  # of gradients in float32
# On the CPU freed tensors go back to the system at once, so that the process's peak is what was held at one time.
EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}


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
    sizes.add_argument(
        "--prompt-tokens", type=prompt_tokens, default=1024, help="text and video (default: %(default)s)"
    )
    sizes.add_argument("--group-size", type=int, default=8, help="responses a prompt (default: %(default)s)")
    sizes.add_argument("--response-tokens", type=int, default=64, help="of each response (default: %(default)s)")
    sizes.add_argument("--microbatch-tokens", type=int, default=16384, help="ours (default: %(default)s)")
    sizes.add_argument(
        "--reference",
        choices=("swap", "resident", "none"),
        default="swap",
        help="ours, as grpo.reference; none: no KL on either side (default: %(default)s)",
    )
    add_layout_arguments(parser)
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=SIDES,
        metavar="SIDE",
        help=f"any of {', '.join(map(repr, SIDES))} (default: all that are installed)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of every side (default: %(default)s)")
    parser.add_argument(
        "--updates", type=int, default=1, help="timed a turn, after one that warms up (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="of the CPU's operators (default: %(default)s)")
    parser.add_argument("--directory", type=Path, help="for weights and gradients (default: for temporary files)")
    parser.add_argument("--profile", type=Path, metavar="DIR", help="one more update of ours, for a trace and a table")
    add_json_argument(parser)
    parser.add_argument("--worker", nargs=4, metavar=("SIDE", "CASE", "RESULT", "GRADIENTS"), help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    layout = parser.add_argument_group("our layout")
    on_gpu = torch.cuda.is_available()
    layout.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16" if on_gpu else "float32",
        help="(default: bfloat16 with a GPU, float32 without)",
    )
    layout.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks (default: %(default)s)")
    layout.add_argument("--pipeline", type=int, default=1, help="pipeline stages (default: %(default)s)")
    layout.add_argument("--copies", type=int, default=1, help="data-parallel copies (default: %(default)s)")
    layout.add_argument("--sequence-parallel", action="store_true", help="as parallel.sequence_parallel")
    layout.add_argument("--first-stage-layers", type=int, help="language-model layers (default: an even share)")
    layout.add_argument("--recompute", choices=RECOMPUTES, default="none", help="(default: %(default)s)")
    layout.add_argument(
        "--layer-spec",
        choices=("auto", "local", "transformer_engine"),
        default="auto",
        help="as model.layer_spec (default: auto)",
    )
    layout.add_argument("--fp8", choices=("tensorwise", "blockwise"), help="as model.fp8 (default: none)")


def run(args: argparse.Namespace) -> int:
    torch.set_num_threads(args.threads)
    if args.worker:
        side, case, result_file, gradients = args.worker
        update = UpdateCase.from_json(Path(case).read_text())
        result = work(side, update, Path(gradients) if gradients else None, args.profile)
        if result is not None:
            Path(result_file).write_text(json.dumps(result))
        return 0
    args.sides = sides_to_compare(args.sides)
    with tempfile.TemporaryDirectory(dir=args.directory, prefix="benchmark-train-") as folder:
        result = (measure if mesh.launched_world_size() == 1 else measure_in_world)(args, Path(folder))
    if result is None:  # another rank reports
        return 0
    write_json(args.json, result)
    report(result)
    differences = [one.get("gradient_difference", 0.0) for one in result["sides"].values()]
    return 1 if result["tolerance"] is not None and max(differences) > result["tolerance"] else 0


def sides_to_compare(asked: Sequence[str] | None) -> list[str]:
    """Our side, then the others that were asked for, or all that can be had here: one process compares, many do not."""
    in_world = mesh.launched_world_size() > 1
    if asked is not None and in_world and set(asked) != {OURS}:
        raise UserError("--sides: the other sides run in one process; start this without torchrun to compare")
    has_trl = importlib.util.find_spec("trl") is not None
    if asked is not None and TRL in asked and not has_trl:
        raise UserError("--sides trl: TRL is not installed; pip install -e '.[peers]'")
    every = [OURS] if in_world else [side for side in SIDES if side != TRL or has_trl]
    return list(dict.fromkeys([OURS, *(every if asked is None else asked)]))


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every side's memory and gradients in a turn of its own, then its seconds, in turns."""
    case = _write_case(args, folder)
    config = model_config(case.model_dir)
    num_processes = args.tensor * args.pipeline * args.copies
    check_layout(config.shape, case.run_config.parallel, case.run_config.recompute, num_processes)
    (folder / "case.json").write_text(case.to_json())
    result_file = folder / "result.json"
    with tqdm(total=(1 + args.rounds) * len(args.sides) + bool(args.profile), desc="turns") as bar:

        def turn(side: str, environment: Mapping[str, str], gradients: str, *options: str) -> dict[str, Any]:
            worker = ["--worker", side, str(folder / "case.json"), str(result_file), gradients, *options]
            run_again(
                ["train", "--threads", str(args.threads), *worker],
                num_processes=num_processes if side == OURS else 1,
                threads=args.threads,
                environment=environment,
            )
            bar.update()
            return json.loads(result_file.read_text())

        compared = len(args.sides) > 1
        memory = {side: turn(side, EXACT_MEMORY, str(folder / side) if compared else "") for side in args.sides}
        timed: dict[str, list[dict[str, Any]]] = {side: [] for side in args.sides}
        for _ in range(args.rounds):
            for side in args.sides:
                timed[side].append(turn(side, {}, ""))
        if args.profile:
            turn(OURS, {}, "", "--profile", str(args.profile))
    summaries = {side: _summary(memory[side], timed[side]) for side in args.sides}
    for side in args.sides[1:]:
        summaries[side] |= _compare(folder / OURS, folder / side)
        summaries[side]["loss_difference"] = abs(summaries[side]["loss"] - summaries[OURS]["loss"])
    return _document(args, case, summaries)


def measure_in_world(args: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    """Our side alone, on the ranks that torchrun or srun started; the result is the first rank's."""
    args.copies = mesh.launched_world_size() // (args.tensor * args.pipeline)  # check_layout refuses a rest
    case = _write_case(args, folder)
    config = model_config(case.model_dir)
    check_layout(config.shape, case.run_config.parallel, case.run_config.recompute, mesh.launched_world_size())
    result = work(OURS, dataclasses.replace(case, num_updates=args.rounds * args.updates), None, args.profile)
    return None if result is None else _document(args, case, {OURS: _summary(result, [result])})


def _document(args: argparse.Namespace, case: UpdateCase, sides: dict[str, Any]) -> dict[str, Any]:
    config = model_config(case.model_dir)
    return machine() | {
        "command": command_line(args),
        "model": args.model,
        "case": dataclasses.asdict(case) | {"model_dir": args.model, "reference_dir": bool(case.reference_dir)},
        "copies": args.copies,
        "tolerance": TOLERANCE if args.dtype == "float32" else None,
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
    model_dirs = [folder / "policy"] if args.reference == "none" else [folder / "policy", folder / "reference"]
    for seed, model_dir in enumerate(model_dirs):
        if args.sides == [OURS]:  # nothing to agree with: ranks fill their own shards
            model_dir.mkdir()
            (model_dir / "config.json").write_text(json.dumps(raw))
        else:
            write_random_model(model_dir, raw, dtype=dtype, seed=seed)
    return UpdateCase(
        model_dir=str(folder / "policy"),
        reference_dir=None if args.reference == "none" else str(folder / "reference"),
        dtype=args.dtype,
        num_prompts=args.prompts,
        prompt_tokens=args.prompt_tokens,
        group_size=args.group_size,
        response_tokens=args.response_tokens,
        reference="resident" if args.reference == "resident" else "swap",
        microbatch_tokens=args.microbatch_tokens,
        tensor=args.tensor,
        pipeline=args.pipeline,
        sequence_parallel=args.sequence_parallel,
        first_stage_layers=args.first_stage_layers,
        recompute=args.recompute,
        layer_spec=args.layer_spec,
        fp8=args.fp8,
        num_updates=args.updates,
    )


def work(side: str, case: UpdateCase, gradients: Path | None, profile: Path | None) -> dict[str, Any] | None:
    """Build one side, warm it up and time it; with `profile`, profile another update of ours into that folder.

    Returns:
        On the first rank, of every rank's memory and seconds the highest; None on the others.
    """
    libraries = memory_bytes()
    reset_peak_memory()
    if side == TRL:
        from throughput.update_trl import TrlUpdate

        update = TrlUpdate(case)
        return _time(update, case, libraries, gradients) | {"notes": update.notes}
    if side != OURS:
        from throughput.update_plain import PlainUpdate

        return _time(PlainUpdate(case, full_logits=side == PLAIN), case, libraries, gradients)
    from throughput.update_ours import OurUpdate

    with mesh.world(case.run_config.parallel, seed=case.seed):
        ours = OurUpdate(case)
        every = collectives.gather_objects(_time(ours, case, libraries, gradients))
        if profile is not None:
            with profiled(profile, f"rank_{dist.get_rank()}"):
                ours.run()
        if not mesh.is_first_rank():
            return None
    return every[0] | {
        "seconds": [max(values) for values in zip(*(one["seconds"] for one in every), strict=True)],
        "cpu_seconds": [max(values) for values in zip(*(one["cpu_seconds"] for one in every), strict=True)],
        "peak_bytes": max(one["peak_bytes"] for one in every),
        "peak_bytes_by_rank": [one["peak_bytes"] for one in every],
    }


def _time(update: Any, case: UpdateCase, libraries_bytes: int, gradients: Path | None) -> dict[str, Any]:
    """One update that warms up, of which loss and gradients are, then the timed ones."""
    at_rest = memory_bytes()
    loss = update.run()
    if gradients is not None:
        update.save_gradients(gradients)
    took = [timed(update.run) for _ in range(case.num_updates)]
    peak = peak_memory_bytes()  # with the optimizer's state, which the first update made
    return {
        "seconds": [wall for wall, _ in took],
        "cpu_seconds": [cpu for _, cpu in took],
        "peak_bytes": peak,
        "at_rest_bytes": at_rest,  # weights, and gradients and optimizer as far as they are there from the start
        "libraries_bytes": libraries_bytes,
        "loss": loss,
        "product_flops_per_s": matrix_product_rate(getattr(torch, case.dtype)),
    }


def _summary(memory: dict[str, Any], turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Memory of the turn that measures it; every timed second of all turns, and their fastest matrix product."""
    kept = ("peak_bytes", "peak_bytes_by_rank", "at_rest_bytes", "libraries_bytes", "loss", "notes")
    took = {key: [value for one in turns for value in one[key]] for key in ("seconds", "cpu_seconds")}
    rate = max(one["product_flops_per_s"] for one in turns)
    return {**took, **{key: memory[key] for key in kept if key in memory}, "product_flops_per_s": rate}


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
    useful, peak = result["flops"]["ours"]["total"], bf16_peak(result["device"])
    # Others may use the same processor: its time says more than the clock.
    clock = "seconds" if peak else "cpu_seconds"
    rows = []
    for side, one in result["sides"].items():
        spread = Spread.of(one[clock])
        devices = num_devices if side == OURS else 1
        rate = useful / spread.median / devices / (peak or one["product_flops_per_s"])
        row = [side, Spread.of(one["seconds"]).text(), spread.text()]
        row += [f"{spread.median / Spread.of(ours[clock]).median:.1f}", f"{one['peak_bytes'] / 1e9:.2f}"]
        above, ours_above = (each["peak_bytes"] - each["libraries_bytes"] for each in (one, ours))
        row += [f"{one['peak_bytes'] / ours['peak_bytes']:.1f} ({above / ours_above:.1f})", f"{100 * rate:.1f} %"]
        row += ["-" if side == OURS else f"{one['gradient_difference']:.1e}"]
        rows.append(row)
    sizes = f"{case['num_prompts']} x ({case['prompt_tokens']} + {case['group_size']} x {case['response_tokens']})"
    libraries = f"{ours['libraries_bytes'] / 1e9:.2f} GB"
    measured_on = "the published bfloat16 peak" if peak else "the rate of a matrix product"
    print_table(
        f"GRPO update, {result['model']}, {case['dtype']}, {sizes} tokens, {result['device']}, {result['date']}",
        ("", "seconds", "processor s", "of ours", "peak GB", "of ours", "MFU", "gradient difference"),
        rows,
        f"Median (range) of {len(ours['seconds'])}. Peak of the {'allocator' if peak else 'process'}, in brackets "
        f"without libraries, {libraries}. MFU: {useful / 1e12:.3f} TFLOP, prompts counted once, of {measured_on}; "
        f"plain computes {result['flops']['plain']['total'] / useful:.1f} times as many. Gradients: largest difference "
        "from ours.",
    )
