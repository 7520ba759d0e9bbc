from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_vcr1.cli.arguments import add_model_arguments, positive_float, run_config
from megatron_vcr1.config.model_sections import ModelSection, ParallelSection


def _parser(*, sharded: bool) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_model_arguments(parser, sharded=sharded)
    return parser


def test_arguments_become_settings() -> None:
    options = ["--model", "m", "--dtype", "float32", "--layer-spec", "local"]
    run = run_config(_parser(sharded=False).parse_args(options))
    assert run.model == ModelSection(path=Path("m"), dtype="float32", layer_spec="local")
    assert run.parallel == ParallelSection()
    layout = ["--tensor-parallel", "2", "--pipeline-parallel", "3"]
    run = run_config(_parser(sharded=True).parse_args([*options, *layout]), sequence_parallel=True)
    assert run.parallel == ParallelSection(tensor=2, pipeline=3, sequence_parallel=True)


@pytest.mark.parametrize("number", ["0", "-1"])
def test_parallel_sizes_must_be_positive(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        _parser(sharded=True).parse_args(["--model", "m", "--tensor-parallel", number])
    assert stopped.value.code == 2
    assert f"{number} is not above 0" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "inf", "nan"])
def test_positive_floats_must_be_finite(number: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"{number} is not above 0 and finite"):
        positive_float(number)
