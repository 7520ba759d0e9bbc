from __future__ import annotations

import os
from pathlib import Path
from typing import get_args

import pytest

from megatron_vcr1.config.loading import load_config
from megatron_vcr1.config.schema import section_classes
from megatron_vcr1.errors import UserError

RUN = """
[model]
path = "qwen"
dtype = "float32"

[parallel]
tensor = 2
"""


@pytest.fixture
def run_toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


def error_of(path: Path, *options: str) -> str:
    with pytest.raises(UserError) as raised:
        load_config(path, options)
    return str(raised.value).replace(str(path), "run.toml")


def test_unset_keys_have_their_defaults(run_toml):
    config = load_config(run_toml)
    assert (config.model.path, config.model.dtype, config.model.freeze) == (Path("qwen"), "float32", ())
    assert (config.parallel.tensor, config.parallel.pipeline, config.parallel.first_stage_layers) == (2, 1, None)


def test_options_override_the_file(run_toml):
    options = (
        "--parallel.tensor 4 --parallel.sequence_parallel=true --model.freeze vision_tower,merger --model.path=a=b"
    )
    config = load_config(run_toml, options.split())
    assert (config.parallel.tensor, config.parallel.sequence_parallel) == (4, True)
    assert config.model.freeze == ("vision_tower", "merger")
    assert config.model.path == Path("a=b")
    assert config.model.dtype == "float32"


def test_an_empty_option_gives_an_empty_list(run_toml):
    run_toml.write_text(RUN.replace("[parallel]", 'freeze = ["merger"]\n[parallel]'))
    assert load_config(run_toml).model.freeze == ("merger",)
    assert load_config(run_toml, ["--model.freeze="]).model.freeze == ()


def test_texts_are_not_split_at_commas(run_toml):
    run_toml.write_text(RUN + '[rollout]\nstop = ["a, b", "c"]')
    assert load_config(run_toml).rollout.stop == ("a, b", "c")
    assert load_config(run_toml, ["--rollout.stop", "x, y"]).rollout.stop == ("x, y",)
    assert load_config(run_toml, ["--rollout.stop="]).rollout.stop == ()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--parallel.tensor", "two"], "--parallel.tensor: input should be a valid integer"),
        (["--parallel.tensor", "0"], "--parallel.tensor: input should be greater than or equal to 1, not '0'"),
        (["--parallel.tenser", "2"], "--parallel.tenser: unknown key; did you mean tensor?"),
        (["--paralel.tensor", "2"], "--paralel.tensor: unknown section; did you mean parallel?"),
        (
            ["--parallel.zzz", "2"],
            "--parallel.zzz: unknown key; use one of tensor, pipeline, context, sequence_parallel",
        ),
        (["--model.dtype", "int8"], "--model.dtype: input should be 'float32' or 'bfloat16', not 'int8'"),
        (["--model.freeze", "head"], "--model.freeze: input should be 'vision_tower', 'merger' or 'language_model'"),
        (["--model.freeze", "vision_tower,merger,language_model"], "nothing would be trained"),
        (["--parallel.sequence_parallel=true", "--parallel.tensor=1"], "sequence_parallel needs tensor > 1"),
        (
            ["--data.min_frames=10", "--data.max_frames=4"],
            "data: min_frames = 10 is above max_frames = 4; lower min_frames",
        ),
        (["--optimizer.learning_rate", "inf"], "--optimizer.learning_rate: input should be a finite number"),
        (["--grpo.kl_coef", "nan"], "--grpo.kl_coef: input should be a finite number"),
        (["--optimizer.min_learning_rate=1"], "optimizer: min_learning_rate = 1.0 is above learning_rate = 1e-06"),
        (["--data.sources", "a.jsonl"], "must be a list, not 'a.jsonl'; write one table [[data.sources]] for each"),
        (["--data.sources.0.thinking=no"], "run.toml: data.sources.0.manifest: missing; add it to the file or give --"),
        (["--data.sources.0.manifest=m", "--data.sources.0.weight=-1"], "--data.sources.0.weight: input should be gr"),
        (["--data.sources.0.manifest=m", "--data.sources.0.tinking=0"], "--data.sources.0.tinking: unknown key; did y"),
        (["--parallel.tensor"], "--parallel.tensor needs a value"),
        (["--parallel.tensor", "--parallel.pipeline", "2"], "--parallel.tensor needs a value"),
        (["--tensor", "2"], "--tensor: unknown option; settings are given as --section.key VALUE"),
        (["tensor"], "tensor: unknown option"),
    ],
)
def test_invalid_options_are_named(run_toml, options, message):
    assert message in error_of(run_toml, *options)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[parallel]\ntensor = 2", "run.toml: model: missing; add it to the file as a table [model]"),
        ("[model]\ndtype = 'float32'", "run.toml: model.path: missing; add it to the file or give --model.path VALUE"),
        (RUN + "tenser = 1", "run.toml: parallel.tenser: unknown key; did you mean tensor?"),
        (RUN + "[quux]\n", "run.toml: quux: unknown section; use one of model, parallel, recompute"),
        (
            RUN + "[[data.sources]]\nmanifesto = 1\nmanifest = 'm'",
            "data.sources.0.manifesto: unknown key; did you mean manifest?",
        ),
        (RUN + "pipeline = 1.5", "run.toml: parallel.pipeline: input should be a valid integer"),
        ("parallel = 3\n[model]\npath='x'", "run.toml: parallel: input should be a valid dictionary"),
        (
            RUN + "[data.sources]\nmanifest = 'm'",
            "data.sources: must be a list, not {'manifest': 'm'}; write one table [[data.sources]] for each entry",
        ),
        (RUN + "[rollout]\nstop = 3", "run.toml: rollout.stop: must be a list, not 3; write it in square brackets"),
        ("extend = 'a.toml'\n" + RUN, "run.toml: extend: unknown section; did you mean extends?"),
        (RUN + "[rollout]\nstop = ['']", "rollout.stop.0: string should have at least 1 character"),
        ("[model", "run.toml: not valid TOML: "),
    ],
)
def test_invalid_keys_in_the_file_are_named(run_toml, text, message):
    run_toml.write_text(text)
    assert message in error_of(run_toml)


def test_an_option_for_a_section_that_is_not_a_table(run_toml):
    run_toml.write_text("parallel = 3\n[model]\npath='x'")
    assert "run.toml: parallel: input should be a valid dictionary" in error_of(run_toml, "--parallel.tensor", "2")


def test_every_problem_is_reported_at_once(run_toml):
    message = error_of(run_toml, "--parallel.tensor", "x", "--model.layer_spec", "flax")
    assert "--parallel.tensor" in message and "--model.layer_spec" in message


def test_settings_of_two_sections_that_exclude_each_other_are_named(run_toml):
    message = error_of(run_toml, "--model.dtype", "float32", "--optimizer.grad_dtype", "bfloat16")
    problem = "optimizer.grad_dtype = 'bfloat16' needs model.dtype = 'bfloat16', not 'float32'"
    assert f"run.toml and the command line: {problem}" in message


def test_settings_that_exclude_each_other_come_from_the_file_or_the_command_line(run_toml):
    problem = "optimizer: min_learning_rate = 1.0 is above learning_rate = 1e-06"
    assert f"run.toml and the command line: {problem}" in error_of(run_toml, "--optimizer.min_learning_rate=1")
    run_toml.write_text(f"{run_toml.read_text()}[optimizer]\nmin_learning_rate = 1\n")
    assert f"run.toml: {problem}" in error_of(run_toml, "--parallel.tensor", "1")


def test_unreadable_files_are_named(tmp_path):
    assert "no such file" in error_of(tmp_path / "missing.toml")
    assert "not a regular file" in error_of(tmp_path)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in error_of(binary)


def test_a_config_is_immutable(run_toml):
    config = load_config(run_toml)
    with pytest.raises(ValueError, match="frozen"):
        config.parallel.tensor = 3


PATH_SETTINGS = ("model.path", "train.run_dir", "data.templates", "data.python_path", "judge.cache", "sglang.python")


def test_every_path_setting_is_listed_here():
    found = {
        f"{name}.{key}"
        for name, section in section_classes().items()
        for key, field in section.model_fields.items()
        if Path in (field.annotation, *get_args(field.annotation))
    }
    assert found == set(PATH_SETTINGS)


@pytest.mark.parametrize("setting", PATH_SETTINGS)
def test_paths_are_expanded(run_toml, monkeypatch, setting):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    section, key = setting.split(".")
    assert getattr(getattr(load_config(run_toml, [f"--{setting}=~/x"]), section), key) == Path("/home/me/x")
    run_toml.write_text(
        f'[model]\npath = "m"\n[{section}]\n{key} = "$SCRATCH/x"\n'.replace('path = "m"\n[model]\n', "")
    )
    assert getattr(getattr(load_config(run_toml), section), key) == Path("/scratch/x")


def test_paths_of_manifests_are_expanded(run_toml, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    run_toml.write_text(
        RUN + '[[data.sources]]\nmanifest = "~/a"\n[[evaluate.benchmarks]]\nname = "charades_sta"\nmanifest = "~/b"'
    )
    config = load_config(run_toml)
    assert config.data.sources[0].manifest == Path("/home/me/a")
    assert config.evaluate.benchmarks[0].manifest == Path("/home/me/b")


def test_an_undefined_variable_names_the_key(run_toml):
    run_toml.write_text(RUN + '[train]\nrun_dir = "$NO_SUCH_NAME/x"\n[[data.sources]]\nmanifest = "${NEITHER}/a"')
    message = error_of(run_toml)
    assert "run.toml: train.run_dir: $NO_SUCH_NAME/x: the environment variable NO_SUCH_NAME is not set" in message
    assert "run.toml: data.sources.0.manifest: ${NEITHER}/a: the environment variable NEITHER is not set" in message
    assert "--train.run_dir: " in error_of(run_toml, "--train.run_dir=$NO_SUCH_NAME")


def test_other_texts_are_not_expanded(run_toml):
    assert load_config(run_toml, ["--rollout.stop=$NO_SUCH_NAME"]).rollout.stop == ("$NO_SUCH_NAME",)


def test_a_byte_order_mark_is_ignored(run_toml):
    run_toml.write_text("\ufeff" + RUN, encoding="utf-8")
    assert load_config(run_toml).parallel.tensor == 2


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a = " + "9" * 5_000, "a = 2026-13-45", "a = 1\0", "[" * 9])
def test_hostile_toml_is_a_user_error(run_toml, text):
    run_toml.write_text(text)
    assert "run.toml: not" in error_of(run_toml)


def test_a_fifo_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    assert "not a regular file" in error_of(tmp_path / "pipe.toml")
