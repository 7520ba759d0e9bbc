from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.config.rendering import default_config
from megatron_vcr1.data.loader import SkippedSample
from megatron_vcr1.parallel import mesh
from megatron_vcr1.training.metrics import Metrics
from megatron_vcr1.training.reporter import Reporter
from megatron_vcr1.training.run_dir import RunDir
from megatron_vcr1.training.shown_samples import ShownSample
from megatron_vcr1.training.trainer import StepResult
from megatron_vcr1.training.validation import ValidationResult

RESULT = StepResult(
    applied=True,
    loss=0.5,
    grad_norm=2.0,
    learning_rate=1e-3,
    samples=("a",),
    rollouts={7: {"id": "second"}, 3: {"id": "first"}},
)


class RecordingSink:
    def __init__(self) -> None:
        self.rows: list[Mapping[str, float]] = []
        self.failed: bool | None = None

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append(metrics)

    def validation(self, step: int, metrics: Mapping[str, float], samples: Sequence[ShownSample]) -> None:
        self.rows.append(metrics)

    def close(self, *, failed: bool) -> None:
        self.failed = failed


class BrokenSink(RecordingSink):
    def close(self, *, failed: bool) -> None:
        raise OSError("no space left")


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with mesh.world(ParallelSection()):
        yield


def _run_dir(path: Path) -> RunDir:
    run_dir = RunDir(path)
    run_dir.create()
    run_dir.open(default_config(), 0)
    return run_dir


def _metrics(difference: float = 0.0) -> Metrics:
    metrics = Metrics()
    metrics.add_to_mean("mismatch/mean_abs", difference)
    return metrics


def test_a_step_is_written_to_the_run_directory_and_the_sinks(tmp_path: Path) -> None:
    sink = RecordingSink()
    with Reporter(_run_dir(tmp_path), lambda: [sink], mismatch_threshold=0.1) as reporter:
        reporter.report(1, RESULT, _metrics(), [SkippedSample("broken", "cannot be decoded")])
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (row["step"], row["loss"], row["lr"], row["grad_norm"]) == (1, 0.5, 1e-3, 2.0)
    assert (row["update_skipped"], row["skipped_samples"]) == (0, 1) and row["memory/peak_gb"] > 0
    assert sink.rows == [row] and sink.failed is False
    rollouts = (tmp_path / "rollouts" / "step_1.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in rollouts] == ["first", "second"]  # by the position of the prompt
    skipped = json.loads((tmp_path / "skipped.jsonl").read_text())
    assert skipped == {"step": 1, "id": "broken", "reason": "cannot be decoded"}


def test_a_validation_has_a_line_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = RecordingSink()
    result = ValidationResult({"a/mIoU": 0.25, "a/num_samples": 2}, [("a", "broken", "cannot be decoded")], ())
    with caplog.at_level("INFO"), Reporter(_run_dir(tmp_path), lambda: [sink], mismatch_threshold=0.1) as reporter:
        reporter.report_validation(0, result, 1.5, note="; best")
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row == {"step": 0, "validation/a/mIoU": 0.25, "validation/a/num_samples": 2, "time/validation_s": 1.5}
    assert {"step": 0, **sink.rows[0]} == row
    assert json.loads((tmp_path / "skipped.jsonl").read_text())["validation"] == "a"
    assert "validation at step 0: a/mIoU 0.25 (1.5 s); best" in caplog.text and "sample broken" in caplog.text


@pytest.mark.parametrize(
    ("difference", "warns"), [(0.05, False), (0.2, True), (math.nan, True)], ids=["small", "large", "nan"]
)
def test_large_mismatch_of_rollout_and_training_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, difference: float, warns: bool
) -> None:
    with Reporter(_run_dir(tmp_path), list, mismatch_threshold=0.1) as reporter:
        reporter.report(1, RESULT, _metrics(difference), [])
    assert ("log-probs of rollout and training differ by" in caplog.text) == warns


def test_all_sinks_are_closed_and_told_of_a_failure(tmp_path: Path) -> None:
    first, last = RecordingSink(), RecordingSink()
    with (
        pytest.raises(OSError, match="no space left"),
        Reporter(_run_dir(tmp_path), lambda: [first, BrokenSink(), last], mismatch_threshold=0.1),
    ):
        raise ValueError("the run fails")
    assert first.failed is last.failed is True
