"""What examples/README.md tells users to type and to set exists."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from megatron_vcr1.cli import main as cli
from megatron_vcr1.config.loading import load_config
from megatron_vcr1.config.schema import section_classes

ROOT = Path(__file__).parents[1]
README = (ROOT / "examples/README.md").read_text()
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.partition("#")[0].strip()
]


def programs(name: str) -> list[list[str]]:
    """Commands of the README that start a program, as lists of words."""
    return [words for line in COMMANDS if (words := shlex.split(line))[0] == name]


@pytest.mark.parametrize("words", programs("vcr1"), ids=" ".join)
def test_vcr1_takes_the_arguments(words):
    args, unknown = cli.build_parser().parse_known_args(words[1:])
    assert callable(args.run) and not unknown


@pytest.mark.parametrize("words", programs("python"), ids=" ".join)
def test_tools_run(words):
    assert import_module(Path(words[1]).stem).main(words[2:]) == 0


def test_every_command_is_one_of_these():
    installs = {"python3.12", "hf", "srun"}  # on a machine with GPUs and the network
    assert {shlex.split(line)[0] for line in COMMANDS} == {"vcr1", "python", "sbatch"} | installs


@pytest.mark.parametrize("words", programs("sbatch"), ids=" ".join)
def test_scripts_and_settings_are_there(words):
    script = next(word for word in words if word.endswith(".sbatch"))
    config = next(word for word in words if word.endswith(".toml"))
    assert (ROOT / script).is_file()
    load_config(ROOT / config)


def test_every_script_is_explained():
    for script in (ROOT / "examples/slurm").glob("*.sbatch"):
        assert re.search(rf"`{re.escape(script.name)}[ `]", README), f"{script.name} is not in examples/README.md"


def test_every_setting_that_is_named_exists():
    sections = section_classes()
    named = {
        (section, key)
        for section, key in re.findall(r"`(?:--)?([a-z]+)\.([a-z_]+)[` .=]", README)
        if section in sections and key != "sbatch"
    }
    assert len(named) > 20
    assert not {f"{section}.{key}" for section, key in named if key not in sections[section].model_fields}


def test_every_variable_that_is_named_is_read():
    job = "".join(path.read_text() for path in (ROOT / "examples/slurm").iterdir())
    for name in ("CONTAINER", "MOUNTS", "HEALTH_CHECK", "MAX_CRASHES", "MIN_LIFE_S", "CPU_BIND"):
        assert f"{name}=" in README or f"`{name}`" in README
        assert f"${{{name}:" in job
