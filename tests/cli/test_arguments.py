from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_vcr1.cli.arguments import (
    add_model_arguments,
    path_argument,
    path_or_url,
    positive_float,
    run_config,
)
from megatron_vcr1.cli.main import build_parser
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


def test_paths_that_the_shell_leaves_alone_are_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert path_argument("~/x") == Path("/home/me/x")
    assert path_argument("$SCRATCH/x") == Path("/scratch/x")
    assert path_or_url("~/x") == "/home/me/x"
    assert path_or_url("s3://bucket/~/$NO_SUCH_NAME") == "s3://bucket/~/$NO_SUCH_NAME"


def test_an_undefined_variable_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        _parser(sharded=False).parse_args(["--model=$NO_SUCH_NAME/x"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "argument --model: $NO_SUCH_NAME/x: the environment variable NO_SUCH_NAME is not set" in message


@pytest.mark.parametrize(
    "command",
    [
        ["train", "PATH"],
        ["rollout", "serve", "PATH"],
        ["config", "--check=PATH"],
        ["evaluate", "PATH"],
        ["evaluate", "--benchmark=x", "--annotations", "PATH", "--predictions=PATH", "--out=PATH"],
        ["generate", "--model=PATH", "--prompt=x", "--video=PATH", "--image=PATH"],
        ["score", "--model=PATH", "--data=PATH", "--out=PATH"],
        ["serve", "--model=PATH", "--files=PATH"],
        ["report", "PATH", "--out=PATH", "--json=PATH"],
        ["data", "import", "mvbench", "--annotations", "PATH", "--videos=PATH", "--out=PATH"],
        ["data", "synthesize", "--out=PATH", "--num-videos=1"],
        ["data", "check", "PATH"],
    ],
)
def test_every_command_expands_its_paths(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    args = build_parser().parse_args([word.replace("PATH", "~/x") for word in command])
    num_paths = sum("PATH" in word for word in command)
    assert repr(vars(args)).count("/home/me/x") == num_paths
    assert "~" not in repr(vars(args))
