"""Defines the arguments of `vcr1 score`; `megatron_vcr1.evaluation.log_probs` does the work."""

from __future__ import annotations

import argparse

from megatron_vcr1.cli.arguments import add_model_arguments, path_argument, positive, positive_float, run_config


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `score` to the `vcr1` command."""
    parser = subparsers.add_parser(
        "score",
        help="compute per-token log-probs of given responses",
        description="Compute per-token log-probs of given responses to prompts with text, images and videos. For a "
        "model that is sharded across processes: torchrun --nproc-per-node N --no-python vcr1 score ... "
        "--tensor-parallel T --context-parallel C --pipeline-parallel P",
        allow_abbrev=False,
    )
    add_model_arguments(parser, sharded=True)
    parser.add_argument(
        "--data",
        type=path_argument,
        required=True,
        metavar="FILE.jsonl",
        help='lines of {"id", "messages", "response"}; a response is a list of token ids or a text, in which control '
        "tokens are plain text; relative paths of videos and images are relative to the current folder",
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        required=True,
        metavar="FILE.jsonl",
        help='the file to write: lines of {"id", "token_ids", "log_probs"}, or of {"id", "error"}',
    )
    parser.add_argument(
        "--context-parallel",
        type=positive,
        default=1,
        metavar="N",
        help="number of ranks that the tokens of a long prompt are split across (default: 1)",
    )
    parser.add_argument(
        "--sequence-parallel", action="store_true", help="also shard activations along the sequence dimension"
    )
    parser.add_argument(
        "--temperature",
        type=positive_float,
        default=1.0,
        metavar="T",
        help="divide the logits by this (default: %(default)s)",
    )
    parser.add_argument(
        "--microbatch-tokens",
        type=positive,
        default=16384,
        metavar="N",
        help="tokens of prompts and responses that are computed at once (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the log-probs. Returns 1 if a request failed. Raises UserError for invalid arguments or input."""
    from megatron_vcr1.errors import UserError
    from megatron_vcr1.evaluation.log_probs import write_log_probs
    from megatron_vcr1.model import cpu

    if args.sequence_parallel and args.tensor_parallel == 1:
        raise UserError("--sequence-parallel needs --tensor-parallel > 1: raise that, or leave it out")
    cpu.install()
    num_failed = write_log_probs(
        run_config(args, context_parallel=args.context_parallel, sequence_parallel=args.sequence_parallel),
        args.data,
        args.out,
        temperature=args.temperature,
        microbatch_tokens=args.microbatch_tokens,
    )
    return 1 if num_failed else 0
