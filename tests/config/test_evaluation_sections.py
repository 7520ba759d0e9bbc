from __future__ import annotations

from megatron_vcr1.config.evaluation_sections import EvaluateSection


def test_a_benchmark_inherits_thinking_and_may_override_it():
    benchmarks = ({"name": "nextgqa", "manifest": "a"}, {"name": "nextgqa", "manifest": "a", "thinking": True})
    section = EvaluateSection(thinking=False, benchmarks=benchmarks)
    assert [benchmark.thinking for benchmark in section.benchmarks] == [False, True]
    assert [benchmark.thinking for benchmark in EvaluateSection(benchmarks=benchmarks).benchmarks] == [True, True]
