"""Defines the arguments of `vcr1 evaluate`; `megatron_vcr1.evaluation` does the work."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_vcr1.cli.arguments import add_task_modules_argument, load_task_modules, path_argument
from megatron_vcr1.command_line import HelpFormatter
from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation.benchmarks import BENCHMARKS, find_benchmark
from megatron_vcr1.tasks import BUILT_IN_TASKS

if TYPE_CHECKING:  # `vcr1 --help` must not load pydantic
    from megatron_vcr1.config.evaluation_sections import JudgeSection
    from megatron_vcr1.evaluation.benchmark_result import BenchmarkResult


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `evaluate` to the `vcr1` command."""
    names = "\n".join(f"  {name:<20} {benchmark.description}" for name, benchmark in BENCHMARKS.items())
    tasks = ", ".join((*BUILT_IN_TASKS, "or your own"))
    row = f"  {'TASK':<20} the samples of that task in any manifest: {tasks}"
    names += "\n" + textwrap.fill(row, 98, subsequent_indent=" " * 23)
    parser = subparsers.add_parser(
        "evaluate",
        help="evaluate a model on benchmarks, or score a file of predictions",
        description="Evaluate a model on the benchmarks of a configuration, with greedy decoding and on any number of "
        "processes (torchrun). The same command resumes an evaluation that was stopped. Results go to "
        "train.run_dir/evaluation/LABEL; if train.run_dir holds a training run, the model must be one of its "
        "checkpoints or its export.\n\n"
        "  vcr1 evaluate CONFIG.toml [--section.key VALUE ...]\n\n"
        "Or evaluate the newest weights of a training run with the prompts and video settings of its training: its "
        "export, or its latest checkpoint if that is of a later step. The test data are manifests, the benchmarks of "
        "CONFIG.toml, or those of the run's own settings. Results go to RUN_DIR/evaluation/LABEL.\n\n"
        "  vcr1 evaluate --run RUN_DIR [--manifest FILE.jsonl ... | CONFIG.toml] [--section.key VALUE ...]\n\n"
        "Or score the predictions of any program, without a model:\n\n"
        "  vcr1 evaluate --benchmark NAME --annotations FILE ... --predictions FILE.jsonl --out metrics.json\n\n"
        "The section [judge], or --judge.key VALUE, selects the judge of captions. The default is word matching.",
        epilog=f"benchmarks:\n\n{names}",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "config",
        nargs="?",
        type=path_argument,
        metavar="CONFIG.toml",
        help="settings with tables [[evaluate.benchmarks]]",
    )
    run_group = parser.add_argument_group("evaluating a training run")
    run_group.add_argument(
        "--run", dest="run_dir", type=path_argument, metavar="RUN_DIR", help="folder of a training run"
    )
    run_group.add_argument(
        "--manifest",
        nargs="+",
        default=[],
        type=path_argument,
        metavar="FILE.jsonl",
        help="test data; the metrics of each task in it are computed",
    )
    scoring = parser.add_argument_group("scoring a file of predictions")
    scoring.add_argument("--benchmark", metavar="NAME", help="name of a benchmark or task, see below")
    scoring.add_argument(
        "--annotations",
        nargs="+",
        type=path_argument,
        metavar="FILE",
        help="a manifest, or the annotations as published",
    )
    scoring.add_argument("--predictions", type=path_argument, metavar="FILE.jsonl", help='lines of {"id", "output"}')
    scoring.add_argument(
        "--out",
        type=path_argument,
        metavar="FILE.json",
        help="the metrics to write; FILE.samples.jsonl gets the metrics of each sample",
    )
    scoring.add_argument(
        "--allow-missing", action="store_true", help="count samples without a prediction as wrong instead of failing"
    )
    scoring.add_argument(
        "--allow-extra", action="store_true", help="leave out predictions for other samples instead of failing"
    )
    add_task_modules_argument(scoring)
    parser.set_defaults(run=run, takes_overrides=True)


def run(args: argparse.Namespace) -> int:
    """Evaluate a model or score a file.

    Returns 1 if the engine failed or too many captions were not judged. Raises UserError for invalid input.
    """
    scores_file = any(value is not None for value in (args.benchmark, args.annotations, args.predictions, args.out))
    if scores_file and (args.config or args.run_dir) is not None:
        raise UserError(
            f"{args.config or args.run_dir}: scoring a file takes no CONFIG.toml and no --run; leave it out"
        )
    of_scoring = {
        "--allow-missing": args.allow_missing,
        "--allow-extra": args.allow_extra,
        "--task-modules": args.task_modules,
    }
    if not scores_file and (given := [name for name, value in of_scoring.items() if value]):
        instead = "; the key data.tasks names tasks of your own" if args.task_modules else ""
        raise UserError(f"{given[0]}: only for scoring a file of predictions; leave it out{instead}")
    if args.manifest and (args.run_dir is None or args.config is not None):
        raise UserError(f"--manifest {args.manifest[0]}: it takes the place of CONFIG.toml, and needs --run RUN_DIR")
    return _score_file(args) if scores_file else _evaluate_model(args)


def _evaluate_model(args: argparse.Namespace) -> int:
    from megatron_vcr1.config.loading import load_config
    from megatron_vcr1.evaluation.evaluate import evaluate_model
    from megatron_vcr1.evaluation.trained_run import evaluation_config, open_run
    from megatron_vcr1.model import cpu
    from megatron_vcr1.rollout.engine import EngineError

    if args.run_dir is not None:
        config = evaluation_config(open_run(args.run_dir), args.config, args.manifest, args.overrides)
    elif args.config is not None:
        config = load_config(args.config, args.overrides)
    else:
        raise UserError(
            "name a CONFIG.toml or a --run to evaluate a model, or --benchmark and a file of predictions to score"
        )
    cpu.install()
    try:
        results = evaluate_model(config)
    except EngineError as error:
        print(f"vcr1: failed: {error}\nThe predictions so far are kept; the same command resumes.", file=sys.stderr)
        return 1
    return _report(results, config.judge)


def _score_file(args: argparse.Namespace) -> int:
    from megatron_vcr1.evaluation.annotations import read_annotations
    from megatron_vcr1.evaluation.benchmark_result import needs_judge, score_file
    from megatron_vcr1.judge import build_judge

    needed = {"--benchmark": args.benchmark, "--annotations": args.annotations, "--predictions": args.predictions}
    missing = [name for name, value in {**needed, "--out": args.out}.items() if value is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} missing: scoring needs all four")
    if args.out.is_dir() or args.out.suffix != ".json":
        raise UserError(f"--out {args.out}: name a file that ends with .json")
    load_task_modules(args)
    benchmark = find_benchmark(args.benchmark)
    section = _judge_section(args.overrides)
    samples = read_annotations(benchmark, args.annotations)
    judge = build_judge(section, args.out.parent / "judge_cache") if needs_judge(samples) else None
    result = score_file(
        benchmark,
        samples,
        args.predictions,
        args.out,
        judge,
        allow_missing=args.allow_missing,
        allow_extra=args.allow_extra,
    )
    return _report([result], section)


def _judge_section(options: Sequence[str]) -> JudgeSection:
    """Build the [judge] section from `--judge.key VALUE` options, the only overrides that scoring takes."""
    from pydantic import ValidationError

    from megatron_vcr1.config.evaluation_sections import JudgeSection
    from megatron_vcr1.config.overrides import option_name, parse_overrides

    overrides = parse_overrides(options)
    if other := [option_name(key) for key in overrides if key[0] != "judge"]:
        raise UserError(f"{other[0]}: scoring a file takes --judge.key VALUE only")
    try:
        return JudgeSection.model_validate({str(key): value for (_, key), value in overrides.items()})
    except ValidationError as error:
        details = error.errors()[0]
        raise UserError(f"--judge.{'.'.join(map(str, details['loc']))}: {details['msg']}") from None


def _report(results: Sequence[BenchmarkResult], judge: JudgeSection) -> int:
    """Print the results, and return the exit code: 1 if too many captions of a benchmark were not judged."""
    from megatron_vcr1.evaluation.printing import print_result

    for result in results:
        print_result(result)
    for result in results:
        summary = result.summary
        if summary.num_unjudged > judge.max_unscored_fraction * summary.num_samples:
            print(
                f"vcr1: {result.benchmark.name}: {summary.num_unjudged} of {summary.num_samples} captions were not "
                "judged, more than judge.max_unscored_fraction allows; the same command tries them again",
                file=sys.stderr,
            )
            return 1
    return 0
