"""Profiles of whole steps, and the tables of where their time went."""

from __future__ import annotations

import gzip
import json
import logging
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vcr1 import timeline
from megatron_vcr1.config.training_sections import ProfileSection
from megatron_vcr1.timeline import Span
from megatron_vcr1.training.profiling import (
    intersect_spans,
    merge_spans,
    operator_table,
    phase_table,
    total_seconds,
)
from megatron_vcr1.training.train import train
from tests.training import workspace

pytestmark = pytest.mark.one_lane


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return workspace.create(tmp_path_factory.mktemp("profiling"), num_videos=6)


def _seconds(table: str) -> dict[str, float]:
    """Return the first column of numbers in the first part of a table."""
    first, _, _ = table.partition("\n\n")
    return {name: float(seconds) for name, seconds in re.findall(r"^(\S+) +([\d.]+)", first, re.MULTILINE)}


@pytest.fixture(scope="module")
def profile(folder: Path) -> Path:
    config = workspace.config(
        folder,
        "grpo",
        train={"num_steps": 4, "prompts_per_step": 2},
        data={"num_workers": 1},
        checkpoint={"every_steps": 2},
        profile={"enabled": True},
    )
    assert train(config) == 0
    return folder / "run" / "profile"


@pytest.fixture(scope="module")
def events(profile: Path) -> list[dict[str, Any]]:
    with gzip.open(profile / "rank_0.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


def test_trace_shows_the_phases_of_two_steps_and_their_operators(events: list[dict[str, Any]]) -> None:
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert {name: names.count(name) for name in ("decode", "rollout", "judge", "reference", "update", "save")} == {
        "decode": 2,
        "rollout": 2,
        "judge": 2,
        "reference": 2,
        "update": 2,
        "save": 1,
    }
    (update, _) = [event for event in events if event.get("cat") == "user_annotation" and event["name"] == "update"]
    inside = [
        event["name"]
        for event in events
        if event.get("cat") == "cpu_op" and 0 <= event["ts"] - update["ts"] <= update["dur"]
    ]
    assert "aten::mm" in inside


def test_workers_have_their_own_tracks_on_the_same_clock(events: list[dict[str, Any]]) -> None:
    spans = [event for event in events if event.get("cat") == "span"]
    assert {event["tid"] for event in spans} == {"MainThread", "decoding worker 0"}
    assert all(event["name"].startswith("prepare train_0") for event in spans if event["tid"] != "MainThread")
    # The profiler's range is within our span. The order of their ends does not depend on the machine's load, and the
    # time between them does.
    phases = ("rollout", "update")
    ours = _ordered(event for event in spans if event["name"] in phases)
    theirs = _ordered(event for event in events if event.get("cat") == "user_annotation" and event["name"] in phases)
    assert [name for name, _, _ in ours] == [name for name, _, _ in theirs] == [*phases, *phases]
    times = [time for (_, *span), (_, *other) in zip(ours, theirs, strict=True) for time in (span[0], *other, span[1])]
    clock_error_us = 5e4
    assert all(earlier <= later + clock_error_us for earlier, later in pairwise(times)), times


def _ordered(events: Iterable[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Return names, starts and ends of events in the order of time."""
    found = [(event["name"], event["ts"], event["ts"] + event["dur"]) for event in events]
    return sorted(found, key=lambda event: event[1])


def test_summary_adds_up_and_names_operators(profile: Path) -> None:
    text = (profile / "rank_0.txt").read_text()
    seconds = _seconds(text)
    assert {"decode", "rollout", "judge", "reference", "update", "save", "other"} < set(seconds)
    total = seconds.pop("total")
    assert sum(seconds.values()) == pytest.approx(total, abs=0.001 * len(seconds))
    assert "aten::mm" in text and "decoding worker 0" in text
    assert "update  " not in text.partition("operator")[2]  # the profiler's ranges are not operators


def test_nothing_is_recorded_without_a_profile(folder: Path, tmp_path: Path) -> None:
    before = list(timeline._recordings), dict(timeline._open_spans)
    config = workspace.config(folder, "sft", train={"run_dir": tmp_path / "run", "num_steps": 1})
    assert train(config) == 0
    assert not (tmp_path / "run" / "profile").exists()
    assert (timeline._recordings, timeline._open_spans) == before


def test_run_that_ends_before_its_profile_warns(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = {"run_dir": tmp_path / "run", "num_steps": 1}
    with caplog.at_level(logging.WARNING):
        assert train(workspace.config(folder, "sft", train=run, profile={"enabled": True})) == 0
    assert "no profile: the run ended before profile.first_step = 2" in caplog.text


S = 10**9


def test_background_time_is_split_into_hidden_and_waited_for() -> None:
    spans = [
        Span("total", "MainThread", 0, 10 * S),
        Span("rollout", "MainThread", 0, 2 * S),
        Span("reference", "MainThread", 2 * S, 3 * S),
        Span("update", "MainThread", 3 * S, 7 * S),
        Span("rollout", "rollout_0", 1 * S, 6 * S),
        Span("prepare a", "decoding worker 0", 8 * S, 9 * S),
    ]
    text = phase_table(spans, total_s=10.0)
    assert _seconds(text) == {"rollout": 2, "reference": 1, "update": 4, "other": 3, "total": 10}
    assert re.search(r"rollout_0 +5\.000 +4\.000 \( 80%\) +1\.000", text)
    assert re.search(r"decoding worker 0 +1\.000 +0\.000 \(  0%\) +0\.000", text)


def test_spans_are_merged_and_intersected() -> None:
    left = merge_spans([Span("b", "x", 4, 8), Span("a", "x", 0, 2), Span("c", "x", 6, 9), Span("d", "x", 6, 7)])
    assert [(span.start_ns, span.end_ns) for span in left] == [(0, 2), (4, 9)]
    right = [Span("r", "y", 1, 5), Span("r", "y", 8, 20)]
    assert [(span.start_ns, span.end_ns) for span in intersect_spans(left, right)] == [(1, 2), (4, 5), (8, 9)]
    assert total_seconds(left) == 7e-9


def test_profile_without_kernels_lists_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(2) + 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # as if another program were profiling the GPU
    assert "aten::add" in operator_table(profiler.key_averages())


def test_last_step_before_first_step_is_refused() -> None:
    with pytest.raises(ValueError, match="last_step = 3 comes before first_step = 4"):
        ProfileSection(first_step=4)
