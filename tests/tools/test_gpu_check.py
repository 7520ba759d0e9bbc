"""The GPU check on a machine without a GPU: its record, its exit codes, and that every step of it exists."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_vcr1.cli.benchmark import build_parser
from megatron_vcr1.config.loading import load_config
from tests.limits import HANG_S

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools/gpu_check.sh"
FAKE_PYTHON = """#!/bin/bash
# Stands in for a Python on a GPU machine: everything can be imported except xdist and MISSING. Writes its arguments to
# the file COMMANDS, one command per paragraph.
printf '%s\\n' "$@" "" >>"$COMMANDS"
case "$1 $2" in
    "-c "*xdist* | "-c "*$MISSING*) echo "ModuleNotFoundError: missing" >&2; exit 1 ;;
    "-c "*) exit 0 ;;
    "- "*) cp "$2" "$3" ;;  # write_record: keep the table instead of JSON
    "-m pytest") echo "7 passed"; echo; exit 0 ;;
    *) echo "$1 failed"; exit 3 ;;
esac
"""
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is available")


def _check(folder: Path, *sections: str, missing: str) -> tuple[int, list[list[str]], list[str]]:
    """Run the script with the fake Python; return its exit code, the commands, and the lines of its record."""
    python, out, commands = folder / "python", folder / "out", folder / "commands"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "OUT": str(out), "PYTHON": str(python)}
    environment |= {"COMMANDS": str(commands), "MISSING": missing}
    code = subprocess.run(["bash", str(SCRIPT), *sections], env=environment, timeout=HANG_S).returncode
    words = [paragraph.split("\n") for paragraph in commands.read_text().removesuffix("\n\n").split("\n\n")]
    return code, words, (out / "gpu_check.json").read_text().splitlines()


def test_record_has_passed_failed_and_skipped_sections(tmp_path: Path) -> None:
    code, _, rows = _check(tmp_path, "kernels", "benchmark", "update_te", missing="transformer_engine")
    assert code == 1
    assert [(row.split()[0], row.split(maxsplit=2)[2]) for row in rows] == [
        ("kernels", "0 7 passed"),
        ("benchmark", "3 tools/benchmark_kernels.py failed"),
        ("update_te", "- skipped: ModuleNotFoundError: missing"),
    ]
    assert "7 passed" in (tmp_path / "out/log.txt").read_text()


def test_every_step_exists(tmp_path: Path) -> None:
    """A section is skipped only without another project's package; its tests and programs must be there."""
    _, commands, rows = _check(tmp_path, missing="nothing")
    assert [row.split()[0] for row in rows] == [
        "kernels", "model", "update", "switches", "benchmark", "update_te", "update_fp8", "update_plain",
    ]  # fmt: skip
    paths = [word for command in commands for word in command if word.startswith(("tools/", "tests/"))]
    paths += [word.removeprefix("--ignore=") for command in commands for word in command if "--ignore=" in word]
    assert len(paths) >= 13
    assert [path for path in paths if not (ROOT / path).exists()] == []
    imports = [line for command in commands if command[0] == "-c" for line in command[1:] if ";" not in line]
    packages = {line.split()[1] for line in imports} - {"transformer_engine.pytorch", "xdist"}
    assert "megatron.core" in packages and [package for package in packages if find_spec(package) is None] == []
    measured = [command[1:] for command in commands if command[0] == "tools/benchmark_throughput.py"]
    parsed = [build_parser().parse_args(arguments) for arguments in measured]
    assert len(parsed) == 5
    (settings,) = [arguments.set for arguments in parsed if "set" in arguments]
    config = tmp_path / "run.toml"
    config.write_text(
        f'[model]\npath = "{tmp_path}"\n[train]\nrun_dir = "run"\n[[data.sources]]\nmanifest = "x.jsonl"\n'
    )
    load_config(config, [word for setting in settings for word in f"--{setting}".split("=")])


@without_gpu
def test_exits_with_2_without_a_gpu_or_with_an_unknown_section(tmp_path: Path) -> None:
    script = ["bash", str(SCRIPT)]
    environment = {"PATH": "/usr/bin:/bin", "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    unknown = subprocess.run([*script, "kernel"], env=environment, capture_output=True, text=True)
    assert unknown.returncode == 2 and "unknown section 'kernel'; the sections are: kernels model" in unknown.stderr
    without = subprocess.run([*script, "kernels"], env=environment, capture_output=True, text=True, timeout=HANG_S)
    assert without.returncode == 2 and "no GPU" in without.stderr
    usage = subprocess.run([*script, "--help"], env=environment, capture_output=True, text=True)
    assert usage.returncode == 0 and "update_plain" in usage.stdout and "set -u" not in usage.stdout
