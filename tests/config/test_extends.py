from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vcr1.config.loading import load_config
from megatron_vcr1.config.rendering import render_toml
from megatron_vcr1.errors import UserError

BASE = """
[model]
path = "qwen"
freeze = ["merger"]

[[data.sources]]
manifest = "a.jsonl"

[[data.sources]]
manifest = "b.jsonl"

[train]
run_dir = "runs/base"
num_epochs = 3
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "own").mkdir()
    return tmp_path / "base.toml"


def extended(base: Path, text: str, name: str = "../base.toml") -> Path:
    path = base.parent / "own" / "run.toml"
    path.write_text(f"extends = {name!r}\n{text}")
    return path


def error_of(path: Path, *options: str) -> str:
    with pytest.raises(UserError) as raised:
        load_config(path, options)
    return str(raised.value).replace(f"{path.parent.parent}/", "")


def test_tables_are_merged_and_lists_are_replaced(base):
    path = extended(base, "[train]\nrun_dir = 'runs/own'\n[model]\nfreeze = ['vision_tower']\n[grpo]\nkl_coef = 0.1")
    config = load_config(path, ["--train.num_epochs", "2"])
    assert (config.model.path, config.model.freeze) == (Path("qwen"), ("vision_tower",))
    assert (config.train.run_dir, config.train.num_epochs, config.grpo.kl_coef) == (Path("runs/own"), 2.0, 0.1)
    assert [source.manifest for source in config.data.sources] == [Path("a.jsonl"), Path("b.jsonl")]
    sources = load_config(extended(base, "[[data.sources]]\nmanifest = 'c.jsonl'")).data.sources
    assert [source.manifest for source in sources] == [Path("c.jsonl")]


def test_list_entries_of_the_extended_file_can_be_overridden(base):
    config = load_config(extended(base, ""), ["--data.sources.1.weight", "2", "--data.sources.0.weight", "1"])
    assert [(source.manifest.name, source.weight) for source in config.data.sources] == [("a.jsonl", 1), ("b.jsonl", 2)]


def test_paths_in_both_files_are_relative_to_the_working_directory(base, monkeypatch):
    monkeypatch.chdir(base.parent / "own")
    path = extended(base, "[judge]\ncache = 'cache'")
    from_there = load_config(Path("run.toml"))
    assert (from_there.train.run_dir, from_there.judge.cache) == (Path("runs/base"), Path("cache"))
    monkeypatch.chdir(base.parent)
    assert load_config(path) == from_there == load_config(Path("own/run.toml"))


def test_the_path_of_the_extended_file_is_expanded(base, monkeypatch):
    monkeypatch.setenv("CONFIGS", str(base.parent))
    assert load_config(extended(base, "", "$CONFIGS/base.toml")).model.path == Path("qwen")
    assert load_config(extended(base, "", str(base))).model.path == Path("qwen")


def test_the_record_of_a_run_is_resolved(base, tmp_path):
    config = load_config(extended(base, "[grpo]\nkl_coef = 0.5"))
    (tmp_path / "config.toml").write_text(render_toml(config, documented=False))
    base.unlink()
    assert load_config(tmp_path / "config.toml") == config


def test_errors_name_the_file_that_sets_the_key(base):
    base.write_text(BASE + "sed = 1\n[grpo]\ngroup_size = 1")
    message = error_of(extended(base, "[optimizer]\nlearning_rate = 0\n[quux]"))
    assert "own/../base.toml: train.sed: unknown key; did you mean seed?" in message
    assert "own/../base.toml: grpo.group_size: input should be greater" in message
    assert "own/run.toml: optimizer.learning_rate: input should be greater" in message
    assert "own/run.toml: quux: unknown section" in message


@pytest.mark.parametrize(
    "name, message",
    [
        ("'base.toml'", "own/run.toml: extends: own/base.toml: no such file; the path is relative to own"),
        ("'../chain.toml'", "own/run.toml: extends: own/../chain.toml extends another file itself, and only one level"),
        ("'run.toml'", "own/run.toml: extends: own/run.toml extends another file itself"),
        ("'..'", "own/..: not a regular file"),
        ("'$NO_SUCH_NAME/a.toml'", "own/run.toml: extends: $NO_SUCH_NAME/a.toml: the environment variable"),
        ("['../base.toml']", "own/run.toml: extends: must be the path of a TOML file, not ['../base.toml']"),
        ("''", "own/run.toml: extends: must be the path of a TOML file, not ''"),
    ],
)
def test_files_that_cannot_be_extended(base, name, message):
    (base.parent / "chain.toml").write_text("extends = 'base.toml'")
    path = extended(base, "")
    path.write_text(f"extends = {name}")
    assert message in error_of(path)


def test_the_extended_file_may_be_incomplete(base):
    base.write_text("[train]\nnum_epochs = 3")
    assert load_config(extended(base, "[model]\npath = 'm'")).train.num_epochs == 3
    assert "model.path: missing" in error_of(extended(base, "[model]\nfreeze = []"))


def test_modules_lie_beside_the_file_that_names_the_tasks(base):
    base.write_text(BASE.replace("[train]", '[data]\ntasks = ["my_task"]\n\n[train]'))
    config = load_config(extended(base, "[[data.sources]]\nmanifest = 'c.jsonl'"))
    assert config.data.python_path is not None and config.data.python_path.resolve() == base.parent
