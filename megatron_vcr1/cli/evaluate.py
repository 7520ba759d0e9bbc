"""`vcr1 evaluate`: arguments and the printed table here, work in evaluation.evaluate."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation.benchmarks import BENCHMARKS, find_benchmark

if TYPE_CHECKING:
    from megatron_vcr1.config.evaluation_sections import JudgeSection
    from megatron_vcr1.evaluation.scoring import Evaluation


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    names = "\n".join(f"  {name:<20} {benchmark.description}" for name, benchmark in BENCHMARKS.items())
    parser = subparsers.add_parser(
        "evaluate",
        help="a model's answers to benchmarks, or the score of a file of answers",
        description="Evaluate a model on the benchmarks of a configuration: greedy answers, on any number of processes "
        "(torchrun), going on where it was stopped. Results go to train.run_dir/evaluation/LABEL.\n\n"
        "  vcr1 evaluate CONFIG.toml [--section.key VALUE ...]\n\n"
        "Or score what any program has answered, without a model:\n\n"
        "  vcr1 evaluate --benchmark NAME --annotations FILE ... --predictions FILE.jsonl --out metrics.json\n\n"
        "Captions are judged as [judge] says, here --judge.key VALUE: by word matching, unless a model is named.",
        epilog=f"benchmarks:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.toml", help="with [[evaluate.benchmarks]]")
    scoring = parser.add_argument_group("scoring of a file")
    scoring.add_argument("--benchmark", metavar="NAME", help="one of the names below")
    scoring.add_argument(
        "--annotations", nargs="+", type=Path, metavar="FILE", help="a manifest, or the files as published"
    )
    scoring.add_argument("--predictions", type=Path, metavar="FILE.jsonl", help='lines of {"id", "output"}')
    scoring.add_argument("--out", type=Path, metavar="FILE.json", help="the figures; OUT.samples.jsonl: each sample's")
    scoring.add_argument(
        "--allow-missing", action="store_true", help="samples without a prediction are wrong, instead of an error"
    )
    parser.set_defaults(run=run, takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Raises UserError for bad arguments or input. Returns 1 if the model's engine failed or the judge mostly did."""
    scores_file = any(value is not None for value in (args.benchmark, args.annotations, args.predictions, args.out))
    if scores_file and args.config is not None:
        raise UserError(f"{args.config}: scoring a file takes no CONFIG.toml; leave it out")
    return _run_predictions(args) if scores_file else _run_model(args)


def _run_model(args: argparse.Namespace) -> int:
    from megatron_vcr1.config.loading import load_config
    from megatron_vcr1.evaluation.evaluate import evaluate_model
    from megatron_vcr1.model import cpu
    from megatron_vcr1.rollout.engine import EngineError

    if args.config is None:
        raise UserError("name a CONFIG.toml to evaluate a model, or --benchmark and a file of answers to score")
    config = load_config(args.config, args.overrides)
    cpu.install()
    try:
        evaluations = evaluate_model(config)
    except EngineError as error:
        print(f"vcr1: failed: {error}\nThe answers so far are kept; the same command goes on.", file=sys.stderr)
        return 1
    for evaluation in evaluations:
        _print_evaluation(evaluation)
    return _exit_code(evaluations, config.judge)


def _run_predictions(args: argparse.Namespace) -> int:
    from megatron_vcr1.evaluation.annotations import read_annotations
    from megatron_vcr1.evaluation.scoring import score_file
    from megatron_vcr1.judge import build_judge
    from megatron_vcr1.types import Task

    needed = {"--benchmark": args.benchmark, "--annotations": args.annotations, "--predictions": args.predictions}
    missing = [name for name, value in {**needed, "--out": args.out}.items() if value is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing: scoring needs all four")
    if args.out.is_dir() or args.out.suffix != ".json":
        raise UserError(f"--out {args.out}: name a file that ends with .json")
    benchmark = find_benchmark(args.benchmark)
    section = _judge_section(args.overrides)
    judge = build_judge(section, args.out.parent / "judge_cache") if benchmark.task is Task.CAPTIONING else None
    samples = read_annotations(benchmark, args.annotations)
    evaluation = score_file(benchmark, samples, args.predictions, args.out, judge, allow_missing=args.allow_missing)
    _print_evaluation(evaluation)
    return _exit_code([evaluation], section)


def _judge_section(options: Sequence[str]) -> JudgeSection:
    """[judge] from `--judge.key VALUE` options, the only ones that scoring takes."""
    from pydantic import ValidationError

    from megatron_vcr1.config.evaluation_sections import JudgeSection
    from megatron_vcr1.config.loading import parse_overrides

    overrides = parse_overrides(options)
    if other := [f"--{section}.{key}" for section, key in overrides if section != "judge"]:
        raise UserError(f"{other[0]}: scoring a file takes --judge.key VALUE only")
    try:
        return JudgeSection.model_validate({key: value for (_, key), value in overrides.items()})
    except ValidationError as error:
        details = error.errors()[0]
        raise UserError(f"--judge.{'.'.join(map(str, details['loc']))}: {details['msg']}") from None


def _exit_code(evaluations: Sequence[Evaluation], judge: JudgeSection) -> int:
    for evaluation in evaluations:
        summary = evaluation.summary
        if summary.num_unjudged > judge.max_unscored_fraction * summary.num_samples:
            print(
                f"vcr1: {evaluation.benchmark.name}: {summary.num_unjudged} of {summary.num_samples} captions were not "
                "judged, more than judge.max_unscored_fraction allows; the same command asks about these again",
                file=sys.stderr,
            )
            return 1
    return 0


def _print_evaluation(evaluation: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    details, summary = evaluation.as_json(), evaluation.summary
    table = Table("metric", "%", "95 % interval", title=f"{evaluation.benchmark.name}: {summary.num_samples} samples")
    for name, one in summary.metrics.items():
        interval = "" if one.low is None or one.high is None else f"{100 * one.low:.1f} to {100 * one.high:.1f}"
        table.add_row(name, f"{100 * one.value:.1f}", interval)
    console = Console()
    if summary.metrics:
        console.print(table)
    if evaluation.judge is not None:
        console.print(f"judge: {evaluation.judge}; {summary.num_unjudged} captions not judged", markup=False)
    for part, reasons in summary.zeros.items():
        counted = ", ".join(f"{number} {reason}" for reason, number in reasons.items())
        console.print(f"{part} 0: {counted}", markup=False)
    kinds = {
        "unanswered": "unanswered",
        "untagged": "untagged",
        "truncated": "truncated",
        "reduced": "to a video that was made smaller for data.max_prompt_tokens",
    }
    counts = [f"{number} {text}" for name, text in kinds.items() if (number := details[f"num_{name}"])]
    if counts:
        console.print(f"outputs: {', '.join(counts)}")
