"""Tables, settings and plot of plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megatron_vcr1.model.presets import model_config
from megatron_vcr1.planning.devices import DEVICES, Cluster
from megatron_vcr1.planning.job import Job
from megatron_vcr1.planning.report import growth_table, plot, print_plans, refusals_table, settings
from megatron_vcr1.planning.search import Plan, Refusal, search


@pytest.fixture(scope="module")
def plan() -> Plan:
    plans, _ = search(Job(model_config("qwen2.5-vl-7b")), Cluster(DEVICES["h100"], 8), longest_response=500)
    return plans[0]


def _printed(console: Console, *items: object) -> str:
    with console.capture() as capture:
        console.print(*items)
    return " ".join(capture.get().split())


def test_settings_are_the_keys_of_a_run(plan: Plan) -> None:
    keys = settings(plan)
    assert keys["parallel.tensor"] == plan.layout.tensor
    assert keys["sglang.num_servers"] * keys["sglang.tensor"] == 8
    assert keys["train.microbatch_tokens"] >= plan.job.group_tokens
    assert None not in keys.values()


@pytest.mark.parametrize("old_log_probs", [0.0, 1.25])
def test_plans_fit_into_80_columns(plan: Plan, old_log_probs: float) -> None:
    plan = replace(plan, time=replace(plan.time, old_log_probs=old_log_probs))
    console = Console(width=80)
    with console.capture() as capture:
        print_plans(console, [plan])
    lines = capture.get().splitlines()
    assert max(len(line) for line in lines if not line.startswith("Settings")) <= 80
    assert any(line.startswith(f"Fastest layout, {plan.layout.name}") for line in lines)
    (head,) = (line.split() for line in lines if "bubble" in line and "rollout" in line)
    assert head[-4:] == ["bubble", "MFU", "MFU", "hours"] and ("probs" in head) == (old_log_probs > 0)
    assert "sync" in head
    assert any(line.startswith("Training keeps up to 187 GB in the host memory of a node (reference") for line in lines)


def test_growth_is_relative_to_the_smallest_size_that_can_run(plan: Plan) -> None:
    text = _printed(Console(width=100), growth_table("title", [(4, 4, "too small"), plan], fixed_batch=True))
    assert "4 GPUs: too small" in text and "1.00x" in text
    assert "All sizes make the same updates" in text


def test_reasons_are_wrapped() -> None:
    text = _printed(Console(width=40), refusals_table([Refusal(8, 1, "word " * 20)]))
    assert text.count("word") == 20


def test_a_plot_is_a_png(plan: Plan, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot([plan, plan], tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
