from __future__ import annotations

import pytest

from megatron_vcr1.evaluation.benchmark_result import score_predictions
from megatron_vcr1.evaluation.benchmarks import find_benchmark
from megatron_vcr1.evaluation.predictions import Prediction
from megatron_vcr1.evaluation.printing import print_result
from megatron_vcr1.judge import Judge
from megatron_vcr1.judge.lexical import LexicalBackend
from tests.evaluation.samples import captions, choices


def test_metrics_reasons_and_unusual_outputs_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    predictions = [
        Prediction("a", "<answer>A</answer>", finish_reason="stop"),
        Prediction("b", "<think>[A", finish_reason="length"),
        Prediction("c", None, "no video"),
    ]
    print_result(score_predictions(find_benchmark("videomme"), choices("a", "b", "c"), predictions, None))
    printed = capsys.readouterr().out
    assert "videomme: 3 samples" in printed
    assert "33.3" in printed and "0.0 to 100.0" in printed
    assert "accuracy 0: 1 no <answer>, 1 no output" in printed
    assert "outputs: 1 unanswered, 1 truncated" in printed
    assert "judge" not in printed


def test_the_judge_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    judge = Judge(LexicalBackend())
    result = score_predictions(find_benchmark("captioning"), captions("a"), [Prediction("a", "A dog barks.")], judge)
    print_result(result)
    assert f"judge: {LexicalBackend.name}; 0 captions not judged" in capsys.readouterr().out
