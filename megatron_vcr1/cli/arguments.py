"""Arguments that several commands share: a model, how it is divided among processes, and numbers above 0."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # pydantic is not for `vcr1 --help` to load
    from megatron_vcr1.config.schema import RunConfig


def positive(text: str) -> int:
    """A whole number above 0."""
    if not int(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return int(text)


def positive_float(text: str) -> float:
    """A finite number above 0."""
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
    return float(text)


def add_model_arguments(parser: argparse.ArgumentParser, *, divided: bool) -> None:
    """--model and what it is built of, for `run_config`.

    Args:
        divided: whether several processes may share the model.
    """
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="a Hugging Face directory, an imported one or a run's checkpoint",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="default: %(default)s")
    parser.add_argument(
        "--layer-spec",
        choices=("auto", "local", "transformer_engine"),
        default="auto",
        help="whose layers it is built of (default: auto, TransformerEngine's where it is installed with a GPU)",
    )
    if divided:
        parser.add_argument(
            "--tensor-parallel", type=positive, default=1, metavar="N", help="ranks that share every layer"
        )
        parser.add_argument(
            "--pipeline-parallel", type=positive, default=1, metavar="N", help="stages that the layers are divided into"
        )
    else:
        parser.set_defaults(tensor_parallel=1, pipeline_parallel=1)


def run_config(args: argparse.Namespace, *, sequence_parallel: bool = False) -> RunConfig:
    """The settings that `add_model_arguments` asked for."""
    from megatron_vcr1.config.model_sections import ModelSection, ParallelSection
    from megatron_vcr1.config.schema import RunConfig

    return RunConfig(
        model=ModelSection(path=args.model, dtype=args.dtype, layer_spec=args.layer_spec),
        parallel=ParallelSection(
            tensor=args.tensor_parallel, pipeline=args.pipeline_parallel, sequence_parallel=sequence_parallel
        ),
    )
