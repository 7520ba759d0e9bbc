from __future__ import annotations

import tomllib

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
    assert "vcr1 config --check FILE" in capsys.readouterr().err


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
