"""Command-line arguments that several commands share."""

from __future__ import annotations

import argparse

import torch

from megatron_vcr1.command_line import positive
from megatron_vcr1.model.presets import add_model_argument
from megatron_vcr1.planning.job import RECOMPUTES


def default_model() -> str:
    return "qwen2.5-vl-3b" if torch.cuda.is_available() else "small"


def prompt_tokens(text: str) -> int:
    """Parse the length of a prompt, which must have room for a video."""
    if int(text) < 128:
        raise argparse.ArgumentTypeError(f"{text} tokens are too few for a prompt with a video; take at least 128")
    return int(text)


def add_size_arguments(parser: argparse.ArgumentParser, *, prompts: int, response_tokens: int) -> None:
    """Add the model, and the sizes of a synthetic rollout."""
    add_model_argument(parser, default=default_model())
    sizes = parser.add_argument_group("sizes")
    sizes.add_argument(
        "--prompts", type=positive, default=prompts, dest="num_prompts", metavar="N", help="(default: %(default)s)"
    )
    sizes.add_argument(
        "--prompt-tokens",
        type=prompt_tokens,
        default=1024,
        metavar="N",
        help="text and vision tokens of a prompt (default: %(default)s)",
    )
    sizes.add_argument(
        "--group-size", type=positive, default=8, metavar="N", help="responses per prompt (default: %(default)s)"
    )
    sizes.add_argument(
        "--response-tokens",
        type=positive,
        default=response_tokens,
        metavar="N",
        help="tokens of each response (default: %(default)s)",
    )


def add_dtype_argument(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16" if torch.cuda.is_available() else "float32",
        help="(default: bfloat16 on a GPU, float32 on a CPU)",
    )


def add_repetition_arguments(parser: argparse.ArgumentParser, *, rounds: int, threads: bool = True) -> None:
    parser.add_argument(
        "--rounds", type=positive, default=rounds, metavar="N", help="repetitions (default: %(default)s)"
    )
    if threads:
        parser.add_argument(
            "--threads", type=positive, default=1, metavar="N", help="CPU threads per process (default: %(default)s)"
        )


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    layout = parser.add_argument_group("layout of our model")
    add_dtype_argument(layout)
    layout.add_argument("--tensor", type=positive, default=1, metavar="N", help="tensor-parallel ranks (default: 1)")
    layout.add_argument("--pipeline", type=positive, default=1, metavar="N", help="pipeline stages (default: 1)")
    layout.add_argument("--replicas", type=positive, default=1, metavar="N", help="data-parallel replicas (default: 1)")
    layout.add_argument("--sequence-parallel", action="store_true", help="see parallel.sequence_parallel")
    layout.add_argument(
        "--first-stage-layers", type=positive, metavar="N", help="language-model layers (default: an equal number)"
    )
    layout.add_argument("--recompute", choices=RECOMPUTES, default="none", help="(default: %(default)s)")
    layout.add_argument(
        "--layer-spec",
        choices=("auto", "local", "transformer_engine"),
        default="auto",
        help="see model.layer_spec (default: %(default)s)",
    )
    layout.add_argument("--fp8", choices=("tensorwise", "blockwise", "mxfp8"), help="see model.fp8 (default: no FP8)")
