"""Arguments that several commands share: the model, its layout, paths, and numbers with a lower bound."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vcr1.command_line import positive as positive  # for the other commands
from megatron_vcr1.errors import UserError
from megatron_vcr1.user_paths import expand_path

if TYPE_CHECKING:  # `vcr1 --help` must not load pydantic
    from megatron_vcr1.config.schema import RunConfig


def path_argument(text: str) -> Path:
    """Parse a path with `~` and environment variables: a shell leaves them in `--out=~/x` and in quotes."""
    return Path(_expanded(text))


def path_or_url(text: str) -> str:
    """Parse a path like `path_argument`; a URL stays as it is."""
    return text if "://" in text else _expanded(text)


def _expanded(text: str) -> str:
    try:
        return expand_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_task_modules_argument(parser: argparse._ActionsContainer) -> None:
    """Add --task-modules, for `load_task_modules`."""
    parser.add_argument(
        "--task-modules",
        nargs="+",
        default=(),
        metavar="MODULE",
        help="Python modules that define tasks of your own, such as my_project.counting; the current folder is "
        "searched, too",
    )


def load_task_modules(args: argparse.Namespace) -> None:
    """Register the tasks of --task-modules. Raises UserError if a module cannot be used."""
    from megatron_vcr1.tasks import load_tasks

    load_tasks(args.task_modules, Path.cwd())


def not_negative(text: str) -> int:
    """Parse an integer that is 0 or more."""
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return int(text)


def positive_float(text: str) -> float:
    """Parse a finite number above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
    return float(text)


def add_model_arguments(parser: argparse.ArgumentParser, *, sharded: bool, required: bool = True) -> None:
    """Add --model and the options that say how to build it, for `run_config`.

    Args:
        parser: the parser of a command.
        required: whether --model must be given.
        sharded: whether the model may be sharded across processes; adds the options for the parallel sizes.
    """
    parser.add_argument(
        "--model",
        type=path_argument,
        required=required,
        metavar="DIR",
        help="a Hugging Face directory, an imported model or a checkpoint of a run",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="data type of the weights and the computation (default: bfloat16)",
    )
    parser.add_argument(
        "--layer-spec",
        choices=("auto", "local", "transformer_engine"),
        default="auto",
        help="implementation of the layers (default: auto: TransformerEngine if it is installed and there is a GPU, "
        "local otherwise)",
    )
    if sharded:
        parser.add_argument(
            "--tensor-parallel", type=positive, default=1, metavar="N", help="tensor-parallel size (default: 1)"
        )
        parser.add_argument(
            "--pipeline-parallel", type=positive, default=1, metavar="N", help="number of pipeline stages (default: 1)"
        )
    else:
        parser.set_defaults(tensor_parallel=1, pipeline_parallel=1)


def run_config(args: argparse.Namespace, *, context_parallel: int = 1, sequence_parallel: bool = False) -> RunConfig:
    """Build the settings from the arguments of `add_model_arguments`."""
    from megatron_vcr1.config.model_sections import ModelSection, ParallelSection
    from megatron_vcr1.config.schema import RunConfig

    return RunConfig(
        model=ModelSection(path=args.model, dtype=args.dtype or "bfloat16", layer_spec=args.layer_spec),
        parallel=ParallelSection(
            tensor=args.tensor_parallel,
            pipeline=args.pipeline_parallel,
            context=context_parallel,
            sequence_parallel=sequence_parallel,
        ),
    )
