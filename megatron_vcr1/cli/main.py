"""The `vcr1` command.

Each command is a module with two functions: `add_parser(subparsers)` defines the arguments, and `run(args)` does the
work and returns the exit code. These modules import heavy packages inside of `run`, so that `vcr1 --help` is fast.

Exit codes: 0, 1 (failed), 2 (bad usage or input), 85 (training saved a checkpoint after a signal), 130 (interrupted).
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence

import megatron_vcr1
from megatron_vcr1.cli import (
    benchmark,
    config,
    convert,
    data,
    evaluate,
    generate,
    plan,
    report,
    rollout,
    score,
    serve,
    status,
    train,
)
from megatron_vcr1.errors import UserError
from megatron_vcr1.user_modules import UserCodeError

COMMANDS = (
    *(config, plan, data, train, status, evaluate, score),
    *(generate, serve, report, rollout, convert, benchmark),
)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser with all commands."""
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
    """Separate `--section.key VALUE` and `--section.key=VALUE` from the other arguments.

    argparse does not know these options and would take VALUE for a positional argument of the command.

    Returns:
        The other arguments, and the overrides.
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
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions
        import argcomplete

        argcomplete.autocomplete(parser)
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
    # Warnings that users can do nothing about. megatron-core warns about Apex in each of its modules; the layer spec is
    # logged once instead.
    warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")
    # megatron-core calls deprecated functions of torch.
    warnings.filterwarnings("ignore", message=".*(all_gather_into|reduce_scatter)_tensor.* is deprecated")
    warnings.filterwarnings("ignore", message=".*The .grad attribute of a Tensor that is not a leaf")
    warnings.filterwarnings("ignore", message=".*load_state_dict.* is deprecated")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("megatron_vcr1").setLevel(logging.INFO)
    try:
        code = args.run(args)
        sys.stdout.flush()  # a full disk or a closed pipe fails here instead of at the interpreter's exit
        return code
    except UserError as error:
        print(f"vcr1: error: {error}", file=sys.stderr)
        return 2
    except UserCodeError as error:
        print(f"vcr1: stopped: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of the pipe has exited, as in `vcr1 config | head`
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
