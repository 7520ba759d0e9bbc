"""Measurements that all commands share."""

from __future__ import annotations

import argparse
import mmap
import time

import pytest
import torch

from megatron_vcr1.throughput import measure


def test_spread_is_median_and_range() -> None:
    spread = measure.Spread.of([3.0, 1.0, 2.0])
    assert spread == measure.Spread(2.0, 1.0, 3.0) and spread.text(1) == "2.0 (1.0 - 3.0)"


def test_sleeping_takes_wall_clock_time_but_no_cpu_time() -> None:
    wall_s, cpu_s = measure.timed(lambda: time.sleep(0.2))
    assert wall_s >= 0.2 > cpu_s


@pytest.mark.skipif(torch.cuda.is_available(), reason="memory of the process is measured on a CPU only")
def test_peak_memory_includes_what_was_freed() -> None:
    measure.reset_peak_memory()
    before = measure.peak_memory_bytes()
    with mmap.mmap(-1, 80_000_000) as memory:  # new pages: malloc could reuse memory that was freed before
        memory.write(bytes(80_000_000))
    assert measure.peak_memory_bytes() - before > 60e6


def test_the_command_line_is_kept_without_its_output_file() -> None:
    args = argparse.Namespace(arguments=["train", "--json", "out.json", "--rounds", "2"])
    assert measure.command_line(args) == "vcr1 benchmark train --rounds 2"


def test_a_failing_process_ends_the_benchmark_with_its_messages() -> None:
    with pytest.raises(SystemExit, match="a process failed"):
        measure.run_again(["no-such-command"])
