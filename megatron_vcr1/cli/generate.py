"""Defines the arguments of `vcr1 generate`; `megatron_vcr1.evaluation.single_prompt` does the work."""

from __future__ import annotations

import argparse
import sys

from megatron_vcr1.cli.arguments import add_model_arguments, path_or_url, run_config

_VIDEO_OPTIONS = {
    "fps": (float, "frames per second to sample (default: 2)"),
    "min_frames": (int, "smallest number of frames (default: 4)"),
    "max_frames": (int, "largest number of frames (default: 768)"),
    "total_pixels": (int, "pixel budget of the video (default: 3584 * 28 * 28)"),
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `generate` to the `vcr1` command."""
    parser = subparsers.add_parser(
        "generate",
        help="generate a response to a prompt about videos or images",
        description="Generate a response to a prompt, and print it token by token. For a model that is sharded across "
        "processes: torchrun --nproc-per-node N --no-python vcr1 generate ... --tensor-parallel T "
        "--pipeline-parallel P",
        allow_abbrev=False,
    )
    add_model_arguments(parser, sharded=True)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question; '-' reads standard input")
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
        "--max-new-tokens", type=int, default=1024, metavar="N", help="longest response (default: %(default)s)"
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
        help="penalty on repeated tokens; 1: none (default: the model's own, from generation_config.json)",
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
        help='print {"text", "token_ids", "log_probs", "finish_reason", "prompt_tokens", "seconds"} at the end instead',
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a response. Raises UserError for invalid arguments, an invalid model or a file that cannot be read."""
    from megatron_vcr1.errors import UserError
    from megatron_vcr1.evaluation.single_prompt import generate_response
    from megatron_vcr1.model import cpu
    from megatron_vcr1.rollout.engine import SamplingParams
    from megatron_vcr1.rollout.special_tokens import read_repetition_penalty

    penalty = read_repetition_penalty(args.model) if args.repetition_penalty is None else args.repetition_penalty
    try:
        params = SamplingParams(
            args.max_new_tokens, args.temperature, args.top_p, args.top_k, tuple(args.stop), penalty
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    options = {name: value for name in _VIDEO_OPTIONS if (value := getattr(args, name)) is not None}
    if options and not any(kind == "video" for kind, _ in args.vision):
        raise UserError(f"--{next(iter(options)).replace('_', '-')} is for videos, and there is none: add --video")
    parts = [{"type": kind, kind: path, **(options if kind == "video" else {})} for kind, path in args.vision]
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    cpu.install()
    generate_response(run_config(args), message, params, seed=args.seed, as_json=args.json)
    return 0
