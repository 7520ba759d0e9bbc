"""Defines the arguments of `vcr1 generate`; `megatron_vcr1.evaluation.single_prompt` does the work."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from megatron_vcr1.cli.arguments import add_model_arguments, path_argument, path_or_url, run_config

if TYPE_CHECKING:
    from megatron_vcr1.evaluation.trained_run import TrainedRun
    from megatron_vcr1.rollout.engine import SamplingParams

_VIDEO_OPTIONS = {
    "fps": (float, "frames per second to sample (default: 2)"),
    "min_frames": (int, "smallest number of frames (default: 4)"),
    "max_frames": (int, "largest number of frames (default: 768)"),
    "total_pixels": (int, "pixel budget of the video (default: the model's, see data.total_pixels)"),
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `generate` to the `vcr1` command."""
    parser = subparsers.add_parser(
        "generate",
        help="generate a response to a prompt about videos or images",
        description="Generate a response to a prompt, and print it token by token. With --run, the newest weights of a "
        "training run answer a query in the prompt of its training, with its video settings, its data type and "
        "without a repetition penalty, as `vcr1 evaluate` asks. For a model that is sharded across processes: "
        "torchrun --nproc-per-node N --no-python vcr1 generate ... --tensor-parallel T --pipeline-parallel P",
        allow_abbrev=False,
    )
    add_model_arguments(parser, sharded=True, required=False)
    _add_run_arguments(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="the whole prompt; '-' reads standard input")
    for kind in ("video", "image"):
        parser.add_argument(
            f"--{kind}",
            dest="vision",
            action="append",
            default=[],
            type=lambda path, kind=kind: (kind, path_or_url(path)),  # type: ignore[misc]
            metavar="FILE",
            help="comes before the prompt, in the given order; may be repeated",
        )
    for name, (number, text) in _VIDEO_OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=number, metavar="N", help=text)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="longest response (default: 1024; with --run, evaluate.max_new_tokens of the run)",
    )
    sampling.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="sampling temperature; 0 takes the most probable token (default: 0)",
    )
    sampling.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the smallest set of tokens with this probability (default: %(default)s)",
    )
    sampling.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="sample from this many of the most probable tokens; 0: all (default: 0)",
    )
    sampling.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="penalty on repeated tokens; 1: none (default: the model's own, from generation_config.json; none with "
        "--run)",
    )
    sampling.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the sampling (default: %(default)s)"
    )
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="text that ends the response; may be repeated"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help='print {"prompt", "text", "token_ids", "log_probs", "finish_reason", "prompt_tokens", "seconds"} at the '
        "end instead",
    )
    parser.set_defaults(run=run)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("asking a training run")
    group.add_argument(
        "--run",
        dest="run_dir",
        type=path_argument,
        metavar="RUN_DIR",
        help="folder of a training run, in place of --model",
    )
    group.add_argument("--query", metavar="TEXT", help="the event, object, question or instruction")
    group.add_argument("--task", metavar="TASK", help="task of the prompt (default: the run's, if it has only one)")
    group.add_argument("--options", nargs="+", default=[], metavar="TEXT", help="options of multiple choice")
    group.add_argument(
        "--value",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="value of another placeholder of the prompt, such as first_box of tracking; may be repeated",
    )
    group.add_argument(
        "--thinking",
        action=argparse.BooleanOptionalAction,
        help="ask for reasoning before the answer, or not (default: as the run was trained)",
    )


def run(args: argparse.Namespace) -> int:
    """Print a response. Raises UserError for invalid arguments, an invalid model or a file that cannot be read."""
    from megatron_vcr1.errors import UserError
    from megatron_vcr1.evaluation.run_prompt import trained_video_options
    from megatron_vcr1.evaluation.single_prompt import generate_response
    from megatron_vcr1.evaluation.trained_run import open_run
    from megatron_vcr1.model import cpu

    if (args.model is None) == (args.run_dir is None):
        raise UserError("name either a --model or a --run")
    trained = open_run(args.run_dir) if args.run_dir is not None else None
    options: dict[str, Any] = {name: value for name in _VIDEO_OPTIONS if (value := getattr(args, name)) is not None}
    if options and not any(kind == "video" for kind, _ in args.vision):
        raise UserError(f"--{next(iter(options)).replace('_', '-')} is for videos, and there is none: add --video")
    if trained is not None:
        args.model, args.dtype = trained.model, args.dtype or trained.config.model.dtype
        options = trained_video_options(trained) | options
    media = [{"type": kind, kind: path, **(options if kind == "video" else {})} for kind, path in args.vision]
    message = _message(args, trained, media)
    params = _sampling_params(args, trained)
    cpu.install()
    generate_response(run_config(args), message, params, seed=args.seed, as_json=args.json)
    return 0


def _message(args: argparse.Namespace, trained: TrainedRun | None, media: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the user's message: --prompt, or the --query in the prompt of the run's training."""
    from megatron_vcr1.errors import UserError
    from megatron_vcr1.evaluation.run_prompt import trained_message

    if args.query is None:
        if args.prompt is None:
            raise UserError("--prompt is missing; with --run, --query is enough")
        text = sys.stdin.read() if args.prompt == "-" else args.prompt
        return {"role": "user", "content": [*media, {"type": "text", "text": text}]}
    if trained is None or args.prompt is not None:
        raise UserError("--query: it is written into the prompt of a run; give --run, and no --prompt")
    if bad := [value for value in args.value if "=" not in value]:
        raise UserError(f"--value {bad[0]}: write NAME=TEXT")
    values = dict(value.split("=", 1) for value in args.value)
    return trained_message(
        trained, args.query, media, task_name=args.task, options=args.options, thinking=args.thinking, values=values
    )


def _sampling_params(args: argparse.Namespace, trained: TrainedRun | None) -> SamplingParams:
    from megatron_vcr1.errors import UserError
    from megatron_vcr1.rollout.engine import SamplingParams
    from megatron_vcr1.rollout.special_tokens import read_repetition_penalty

    max_new_tokens, penalty = args.max_new_tokens, args.repetition_penalty
    if max_new_tokens is None:
        max_new_tokens = trained.config.evaluate.max_new_tokens if trained else 1024
    if penalty is None:
        penalty = 1.0 if trained else read_repetition_penalty(args.model)
    try:
        return SamplingParams(max_new_tokens, args.temperature, args.top_p, args.top_k, tuple(args.stop), penalty)
    except ValueError as error:
        raise UserError(str(error)) from error
