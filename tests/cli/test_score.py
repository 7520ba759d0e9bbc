from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vcr1.cli.main import main
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.evaluation import log_probs

ARGUMENTS = ["score", "--model", "m", "--data", "requests.jsonl", "--out", "scores.jsonl"]


def test_sequence_parallelism_needs_tensor_parallelism(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--sequence-parallel"]) == 2
    assert "--sequence-parallel needs --tensor-parallel > 1" in capsys.readouterr().err


@pytest.mark.parametrize("num_failed, code", [(0, 0), (3, 1)])
def test_failed_requests_give_exit_code_1(monkeypatch: pytest.MonkeyPatch, num_failed: int, code: int) -> None:
    calls: list[tuple[object, ...]] = []

    def write_log_probs(run: RunConfig, data: Path, out: Path, **options: float) -> int:
        calls.append((run.parallel.tensor, run.parallel.sequence_parallel, data, out, options))
        return num_failed

    monkeypatch.setattr(log_probs, "write_log_probs", write_log_probs)
    assert main([*ARGUMENTS, "--sequence-parallel", "--tensor-parallel", "2", "--temperature", "0.5"]) == code
    options = {"temperature": 0.5, "microbatch_tokens": 16384}
    assert calls == [(2, True, Path("requests.jsonl"), Path("scores.jsonl"), options)]
