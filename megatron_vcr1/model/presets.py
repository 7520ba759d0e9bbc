"""The choice of a model by the name of a preset, or by its directory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vcr1.model.families.presets import PRESETS
from megatron_vcr1.text_files import read_json, require_object

if TYPE_CHECKING:  # `vcr1 --help` lists the presets and must not load pydantic
    from megatron_vcr1.model.config import ModelConfig


def add_model_argument(
    parser: argparse.ArgumentParser, *, default: str | None, default_text: str = "%(default)s"
) -> None:
    """Add --model.

    Args:
        default_text: the default in the help text, for a command that needs to know whether the option was given.
    """
    parser.add_argument(
        "--model",
        default=default,
        type=_preset_or_directory,
        metavar="MODEL",
        help=f"one of {', '.join(PRESETS)}, or a directory with a config.json (default: {default_text})",
    )


def _preset_or_directory(name: str) -> str:
    if name not in PRESETS and not (Path(name) / "config.json").is_file():
        raise argparse.ArgumentTypeError(
            f"{name!r} is neither one of {', '.join(PRESETS)} nor a directory with a config.json"
        )
    return name


def raw_config(model: str) -> dict[str, Any]:
    """Return the parsed config.json of a preset or of a directory."""
    path = Path(model) / "config.json"
    return dict(PRESETS[model]) if model in PRESETS else require_object(read_json(path), path)


def model_config(model: str) -> ModelConfig:
    """Return the configuration of a preset or of a directory's model."""
    from megatron_vcr1.model.config import ModelConfig

    return ModelConfig.from_dict(PRESETS[model]) if model in PRESETS else ModelConfig.from_pretrained(model)
