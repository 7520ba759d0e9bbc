"""`vcr1 score`: arguments here, work in evaluation.score."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_vcr1.cli.arguments import add_model_arguments, positive, positive_float, run_config


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "score",
        help="per-token log-probs of given responses",
        description="Per-token log-probs of given responses to prompts with text, images and videos. For a model "
        "divided among processes: torchrun --nproc-per-node N --no-python vcr1 score ... --tensor-parallel T "
        "--pipeline-parallel P",
        allow_abbrev=False,
    )
    add_model_arguments(parser, divided=True)
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE.jsonl",
        help='lines of {"id", "messages", "response"}; a response is a text or a list of token ids; relative paths of '
        "videos and images count from the current folder",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE.jsonl", help='lines of {"id", "token_ids", "log_probs"}'
    )
    parser.add_argument("--sequence-parallel", action="store_true", help="divide activations along the sequence too")
    parser.add_argument(
        "--temperature",
        type=positive_float,
        default=1.0,
        metavar="T",
        help="logits are divided by this; default: %(default)s",
    )
    parser.add_argument(
        "--microbatch-tokens",
        type=positive,
        default=16384,
        metavar="N",
        help="prompts and responses computed at once; default: %(default)s",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from megatron_vcr1.errors import UserError
    from megatron_vcr1.evaluation.score import score_file
    from megatron_vcr1.model import cpu

    if args.sequence_parallel and args.tensor_parallel == 1:
        raise UserError("--sequence-parallel needs --tensor-parallel > 1: raise that, or leave it out")
    cpu.install()
    num_failed = score_file(
        run_config(args, sequence_parallel=args.sequence_parallel),
        args.data,
        args.out,
        temperature=args.temperature,
        microbatch_tokens=args.microbatch_tokens,
    )
    return 1 if num_failed else 0
