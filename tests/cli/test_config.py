from __future__ import annotations

import re
import tomllib

import pytest

from megatron_vcr1.cli import main as cli


def test_config_prints_a_file_that_passes_its_check(tmp_path, capsys):
    assert cli.main(["config"]) == 0
    documented = capsys.readouterr().out
    path = tmp_path / "run.toml"
    path.write_text(documented)
    assert cli.main(["config", "--check", str(path), "--parallel.tensor", "2"]) == 0
    checked = tomllib.loads(capsys.readouterr().out)
    assert checked["parallel"].pop("tensor") == 2
    default = tomllib.loads(documented)
    assert default["parallel"].pop("tensor") == 1
    assert checked == default


def test_overrides_without_a_file_are_refused(capsys):
    assert cli.main(["config", "--parallel.tensor", "2"]) == 2
    assert "vcr1 config FILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.toml", "--check", "b.toml"], "a.toml and --check b.toml: name one file"),
        (["--check", "b.toml", "--gpu", "h100"], "--gpu and --gpus-per-node: .*; add --ranks"),
        (["b.toml", "--gpus-per-node", "4"], "--gpu and --gpus-per-node: .*; add --ranks"),
    ],
)
def test_options_that_would_be_ignored_are_refused(arguments, message, capsys):
    assert cli.main(["config", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_config_prints_the_resolved_settings_of_a_file(tmp_path, capsys):
    (tmp_path / "base.toml").write_text('[model]\npath = "m"\n[[data.sources]]\nmanifest = "a.jsonl"')
    (tmp_path / "run.toml").write_text('extends = "base.toml"\n[data]\nthinking = false')
    options = ["--data.sources.0.manifest", "b.jsonl", "--data.sources.1.manifest=c.jsonl"]
    assert cli.main(["config", str(tmp_path / "run.toml"), *options]) == 0
    settings = tomllib.loads(capsys.readouterr().out)
    assert settings["model"]["path"] == "m" and "extends" not in settings
    sources = [(source["manifest"], source["thinking"]) for source in settings["data"]["sources"]]
    assert sources == [("b.jsonl", False), ("c.jsonl", False)]


def test_overrides_may_come_before_and_after_other_arguments(tmp_path, capsys):
    assert cli.main(["config"]) == 0
    path = tmp_path / "run.toml"
    path.write_text(capsys.readouterr().out)
    overrides = ["--parallel.tensor", "2", "--model.freeze=merger"]
    for argv in (["config", *overrides, "--check", str(path)], [*overrides, "config", "--check", str(path)]):
        assert cli.main(argv) == 0
        checked = tomllib.loads(capsys.readouterr().out)
        assert (checked["parallel"]["tensor"], checked["model"]["freeze"]) == (2, ["merger"])
    assert cli.main(["config", "--check", str(path), "--parallel.tensor"]) == 2
    assert "--parallel.tensor needs a value" in capsys.readouterr().err
