"""The `vcr1` command.

A command is a module with two functions: `add_parser(subparsers)` describes its arguments, and the function that it
sets as `run` does the work and returns the exit code. Such modules import nothing heavy at the top, so that
`vcr1 --help` answers at once.

Exit codes: 0, 1 (failed), 2 (bad usage or input), 85 (training saved itself after a signal), 130 (interrupted).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence

import megatron_vcr1
from megatron_vcr1.cli import config, data, evaluate, generate, report, rollout, score, serve, train
from megatron_vcr1.errors import UserError

COMMANDS = (config, data, train, evaluate, score, generate, serve, report, rollout)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vcr1",
        description="Reinforcement fine-tuning of video language models on megatron-core.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"vcr1 {megatron_vcr1.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without `--section.key VALUE` and `--section.key=VALUE`, and these: argparse would take a VALUE for
    an argument of the command's own.
    """
    arguments: list[str] = []
    overrides: list[str] = []
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        name, equals, _ = argument.partition("=")
        if not (name.startswith("--") and "." in name):
            arguments.append(argument)
            continue
        overrides.append(argument)
        if not equals and remaining and not remaining[0].startswith("--"):
            overrides.append(remaining.pop(0))
    return arguments, overrides


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    A command whose parser sets `takes_overrides` finds the `--section.key VALUE` options in `args.overrides`.
    """
    parser = build_parser()
    arguments, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    args, unknown = parser.parse_known_args(arguments)
    unknown = overrides + unknown
    if getattr(args, "takes_overrides", False):
        args.overrides = unknown
    elif unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    # What is installed is chosen, and named in the log, once; megatron-core repeats it in every module.
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")
    # megatron-core's calls
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor.* is deprecated")
    warnings.filterwarnings("ignore", message=".*The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", message=".*load_state_dict.* is deprecated")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("megatron_vcr1").setLevel(logging.INFO)
    try:
        code = args.run(args)
        sys.stdout.flush()  # a full disk or a closed pipe shows here, not while the interpreter exits
        return code
    except UserError as error:
        print(f"vcr1: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has what it wanted: `vcr1 config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"vcr1: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vcr1: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
