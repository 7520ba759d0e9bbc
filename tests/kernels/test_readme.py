"""The Python example of kernels/README.md runs, and every command in it is run by a test or needs a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import vcr1_kernels

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "kernels/README.md").read_text()

# For each command, the test that runs it.
RUN_BY = {
    "python -m pytest tests/kernels": "tests/kernels/test_readme.py",  # this test run
    "python tools/benchmark_kernels.py": "tests/tools/test_benchmark_kernels.py",
}


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_example_runs() -> None:
    (example,) = _blocks("python")
    names: dict[str, Any] = {}
    exec(compile(example, "kernels/README.md", "exec"), names)
    assert names["result"].loss.isfinite()
    for name in ("query", "key", "value", "head"):
        assert names[name].grad.isfinite().all() and names[name].grad.count_nonzero() > 0
    torch.testing.assert_close(names["result"].tokens.ratio, torch.ones(64))  # on-policy


def test_every_command_is_tested_or_needs_a_gpu() -> None:
    commands = [line for block in _blocks("bash") for line in block.splitlines()]
    assert len(commands) >= 3
    for command in commands:
        tests = [path for start, path in RUN_BY.items() if command.startswith(start)]
        assert "needs a GPU" in command or [path for path in tests if (ROOT / path).is_file()], command


def test_every_public_op_is_in_the_table() -> None:
    ops = {name for name in vcr1_kernels.__all__ if not name[0].isupper()}
    assert {name for name in ops if f"`{name}`" not in TEXT} == set()
