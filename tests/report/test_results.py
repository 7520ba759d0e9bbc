from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vcr1.report.results import (
    MAX_COLUMNS,
    main_table,
    num_answers_and_samples,
    result_table,
)
from megatron_vcr1.report.run_record import Estimate, EvaluationResult, RunRecord
from tests.report.runs import report_run


def test_rows_are_compared_with_the_first_row(tmp_path):
    base = report_run(tmp_path / "base", test={"mIoU": (0.3, 0.25, 0.35), "R@0.5": (0.2, 0.1, 0.3)})
    near = report_run(tmp_path / "near", test={"mIoU": (0.33, 0.28, 0.38), "R@0.5": (0.2, 0.1, 0.3)})
    far = report_run(tmp_path / "far", test={"mIoU": (0.6, 0.55, 0.65)}, other={"acc": (0.9, 0.8, 1.0)})
    table = result_table([base, near, far])
    assert table.columns == {"test": ["mIoU", "R@0.5"], "other": ["acc"]} == main_table([base, near, far]).columns
    assert table.captions["test"] == "charades sta, judged by words"
    first, second, third = (row.cells for row in table.rows)
    miou = ("test", "mIoU")
    assert first[miou].delta is None and not first[miou].best
    assert second[miou].delta == pytest.approx(0.03) and not second[miou].apart
    assert third[miou].delta == pytest.approx(0.3) and third[miou].apart and third[miou].best
    assert not second["test", "R@0.5"].best  # both the same
    assert third["other", "acc"].delta is None and not third["other", "acc"].best


def test_many_benchmarks_show_their_first_metrics_side_by_side(tmp_path):
    metrics = {f"metric{number}": (0.5, 0.4, 0.6) for number in range(5)}
    run = report_run(tmp_path / "run", **{f"benchmark{number}": metrics for number in range(6)})
    table = result_table([run])
    assert [len(metrics) for metrics in table.columns.values()] == [5] * 6
    assert [len(metrics) for metrics in main_table([run]).columns.values()] == [2] * 6 and 2 * 6 <= MAX_COLUMNS < 3 * 6


def grounding(run: RunRecord, label: str, miou: float, *, thinking: bool, manifest: str = "test.jsonl", **details: str):
    """A result as `read_run` returns it."""
    model = str(run.path / "export")
    metrics = {"mIoU": Estimate(miou, miou - 0.02, miou + 0.02), "R@0.5": Estimate(1 - miou)}
    details = {"manifest": manifest, **details}
    return EvaluationResult(label, "grounding", model, thinking, 50, metrics, run.path / label, details)


@pytest.fixture
def runs(tmp_path) -> list[RunRecord]:
    """Three runs: evaluated both ways, without thinking, and with thinking."""
    base, sft, grpo = (report_run(tmp_path / name, {"step": 1}) for name in ("base", "sft", "grpo"))
    both = (
        grounding(base, "grounding", 0.3, thinking=False),
        grounding(base, "grounding_thinking", 0.4, thinking=True),
        grounding(base, "other", 0.1, thinking=False, manifest="other.jsonl"),
    )
    return [
        replace(base, evaluations=both),
        replace(sft, evaluations=(grounding(sft, "grounding", 0.6, thinking=False),)),
        replace(grpo, evaluations=(grounding(grpo, "grounding_thinking", 0.5, thinking=True),)),
    ]


def test_a_benchmark_has_one_column_with_the_better_of_thinking_and_answering(runs):
    table = main_table(runs)
    assert list(table.columns) == ["grounding", "other"] and table.mixed == {"grounding"}
    cells = [row.cells["grounding", "mIoU"] for row in table.rows]
    assert [(cell.estimate.value, cell.how) for cell in cells] == [
        (0.4, "thinking"),
        (0.6, "answering"),
        (0.5, "thinking"),
    ]
    assert [cell.delta for cell in cells] == [None, pytest.approx(0.2), pytest.approx(0.1)]
    assert [cell.best for cell in cells] == [False, True, False]
    # other metrics come from the same result, though the other result has a larger value
    assert table.rows[0].cells["grounding", "R@0.5"].estimate.value == pytest.approx(0.6)
    assert table.captions == {"grounding": "", "other": "grounding, answering"}
    assert all(row.own for row in table.rows)


def test_the_whole_table_shows_every_result(runs):
    table = result_table(runs)
    assert list(table.columns) == ["grounding", "grounding_thinking", "other"] and not table.mixed
    assert table.captions["grounding"] == "answering" and table.captions["grounding_thinking"] == ""


def test_a_runs_own_model_is_recognized_by_relative_paths(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (result,) = runs[1].evaluations
    (row,) = result_table([replace(runs[1], evaluations=(replace(result, model="sft/export"),))]).rows
    assert row.own


@pytest.mark.parametrize("changed", [{"manifest": "longer.jsonl"}, {"judge": "words"}])
def test_results_that_differ_in_more_than_thinking_have_separate_columns(runs, changed):
    base, *_ = runs
    results = (
        grounding(base, "grounding", 0.3, thinking=False),
        grounding(base, "grounding_thinking", 0.4, thinking=True, **changed),
    )
    assert list(main_table([replace(base, evaluations=results)]).columns) == ["grounding", "grounding_thinking"]


def test_two_labels_without_difference_in_thinking_are_two_columns(runs):
    base, *_ = runs
    results = [grounding(base, label, 0.3, thinking=label == "c") for label in ("a", "b", "c")]
    assert list(main_table([replace(base, evaluations=results)]).columns) == ["a", "b", "c"]


def test_every_answer_is_counted_and_every_sample_once(runs):
    assert num_answers_and_samples(runs) == (5 * 50, 2 * 50)


def test_the_tasks_of_a_manifest_have_samples_of_their_own(runs):
    base, *_ = runs
    result = grounding(base, "a", 0.3, thinking=False)
    names = ("temporal_grounding", "charades_sta", "tracking")  # the first two have the same task
    results = tuple(replace(result, label=name, benchmark=name) for name in names)
    assert num_answers_and_samples([replace(base, evaluations=results)]) == (3 * 50, 2 * 50)
