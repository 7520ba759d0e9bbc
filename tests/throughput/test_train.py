"""The update benchmark: its sides, their comparison and the table."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import benchmark_throughput
import pytest
import torch
from safetensors.torch import save_file

from megatron_vcr1.errors import UserError
from megatron_vcr1.throughput import train

pytestmark = pytest.mark.xdist_group("gloo")

UPDATE = ["--model", "tiny", "--prompt-tokens", "130", "--group-size", "2", "--response-tokens", "4", "--rounds", "1"]


def test_sides_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the worker processes in this process, one after another."""
    runs = []

    def run_here(arguments: list[str], *, num_processes: int, threads: int, environment: dict[str, str]) -> None:
        runs.append((arguments[arguments.index("--worker") + 1], dict(environment)))
        assert num_processes == threads == 1
        assert benchmark_throughput.main(arguments) == 0

    monkeypatch.setattr(train, "run_again", run_here)
    out = tmp_path / "train.json"
    assert benchmark_throughput.main(["train", *UPDATE, "--sides", "plain", "--json", str(out)]) == 0
    assert "largest difference from ours" in " ".join(capsys.readouterr().out.split())
    assert [side for side, _ in runs] == ["ours", "plain"] * 2
    assert all(environment for _, environment in runs[:2]) and not any(environment for _, environment in runs[2:])
    result = json.loads(out.read_text())
    plain = result["sides"]["plain"]
    assert plain["gradient_difference"] < 1e-6 < plain["largest_gradient"]
    assert plain["loss_difference"] < 1e-6
    assert result["flops"]["plain"]["total"] > result["flops"]["ours"]["total"]


def test_trl_is_compared_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert train.sides_to_compare(None) == [train.OURS, train.PLAIN, train.PLAIN_KEPT]
    with pytest.raises(UserError, match="--sides trl: TRL is not installed"):
        train.sides_to_compare([train.TRL])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert train.sides_to_compare(None) == list(train.SIDES)
    assert train.sides_to_compare([train.TRL]) == [train.OURS, train.TRL]


def test_different_gradients_are_found(tmp_path: Path) -> None:
    save_file({"a": torch.tensor([1.0, -2.0])}, tmp_path / "ours")
    save_file({"a": torch.tensor([1.0, -2.5])}, tmp_path / "other")
    assert train.compare_gradients(tmp_path / "ours", tmp_path / "other") == {
        "gradient_difference": 0.5,
        "largest_gradient": 2.5,
    }
    save_file({"b": torch.tensor([1.0])}, tmp_path / "other")
    with pytest.raises(RuntimeError, match="names"):
        train.compare_gradients(tmp_path / "ours", tmp_path / "other")
