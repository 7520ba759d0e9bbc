"""`vcr1 generate`: arguments here, work in evaluation.generate."""

from __future__ import annotations

import argparse

from megatron_vcr1.cli.arguments import add_model_arguments, run_config

_VIDEO_OPTIONS = {
    "fps": (float, "frames sampled a second (default: 2)"),
    "min_frames": (int, "fewest frames (default: 4)"),
    "max_frames": (int, "most frames (default: 768)"),
    "total_pixels": (int, "pixel budget of the video (default: 3584 * 28 * 28)"),
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="answer a prompt about a video or picture",
        description="Answer a prompt, token by token as they come. For a model divided among processes: "
        "torchrun --nproc-per-node N --no-python vcr1 generate ... --tensor-parallel T --pipeline-parallel P",
        allow_abbrev=False,
    )
    add_model_arguments(parser, divided=True)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the question; '-' reads standard input")
    for kind in ("video", "image"):
        parser.add_argument(
            f"--{kind}",
            dest="vision",
            action="append",
            default=[],
            type=lambda path, kind=kind: (kind, path),  # type: ignore[misc]
            metavar="FILE",
            help="shown before the prompt, in the given order; may be repeated",
        )
    for name, (number, text) in _VIDEO_OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=number, metavar="N", help=text)
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="longest answer; default: 1024")
    sampling.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default, takes the most probable token"
    )
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="smallest set with this probability")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="most probable tokens; 0, the default: all")
    sampling.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="1: none; default: the model's own (generation_config.json)",
    )
    sampling.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends the answer too; may be repeated"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help='print {"text", "token_ids", "log_probs", "finish_reason", "prompt_tokens", "seconds"} at the end instead',
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import sys

    from megatron_vcr1.errors import UserError
    from megatron_vcr1.evaluation.generate import generate
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
        raise UserError(f"--{next(iter(options)).replace('_', '-')} is about a video, and there is none: add --video")
    parts = [{"type": kind, kind: path, **(options if kind == "video" else {})} for kind, path in args.vision]
    text = sys.stdin.read() if args.prompt == "-" else args.prompt
    message = {"role": "user", "content": [*parts, {"type": "text", "text": text}]}
    cpu.install()
    generate(run_config(args), message, params, seed=args.seed, as_json=args.json)
    return 0
