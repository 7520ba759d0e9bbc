"""Measurements that all commands share."""

from __future__ import annotations

import argparse
import time

import pytest

from megatron_vcr1.throughput import measure


def test_spread_is_median_and_range() -> None:
    spread = measure.Spread.of([3.0, 1.0, 2.0])
    assert spread == measure.Spread(2.0, 1.0, 3.0) and spread.text(1) == "2.0 (1.0 - 3.0)"


def test_sleeping_takes_wall_clock_time_but_no_cpu_time() -> None:
    wall_s, cpu_s = measure.timed(lambda: time.sleep(0.2))
    assert wall_s >= 0.2 > cpu_s


@pytest.mark.parametrize("option", [["--json", "out.json"], ["--json=out.json"]])
def test_the_command_line_is_kept_without_its_output_file(option: list[str]) -> None:
    args = argparse.Namespace(arguments=["train", *option, "--rounds", "2"])
    assert measure.provenance(args)["command"] == "vcr1 benchmark train --rounds 2"


def test_a_failing_process_ends_the_benchmark_with_its_messages() -> None:
    with pytest.raises(SystemExit, match="a process failed"):
        measure.run_again(["no-such-command"])
