from __future__ import annotations

import pytest

from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation.benchmarks import find_benchmark
from megatron_vcr1.tasks import task_names
from tests.evaluation.samples import captions, choices


def test_a_benchmark_selects_its_samples() -> None:
    short, long = choices("a", category="short/OCR"), choices("b", category="long/OCR")
    assert find_benchmark("videomme_short").select([*long, *short, *captions("c")], "m.jsonl") == short
    with pytest.raises(UserError, match=r"m\.jsonl: none of its 1 samples is for benchmark tracking, of tracking"):
        find_benchmark("tracking").select(long, "m.jsonl")


def test_an_unknown_benchmark_is_refused_with_the_known_names() -> None:
    with pytest.raises(UserError, match="coco: no such benchmark; there are charades_sta, "):
        find_benchmark("coco")


def test_every_task_is_a_benchmark() -> None:
    assert {find_benchmark(task).task for task in task_names()} == set(task_names())
