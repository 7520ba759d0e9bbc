from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vcr1.evaluation.report.run_record import read_run
from megatron_vcr1.evaluation.report.tables import (
    MAX_COLUMNS,
    key_figures,
    phase_rows,
    result_table,
    settings_that_differ,
    zero_rows,
)


def make(folder: Path, *rows: dict[str, float], config: str = "", **benchmarks: dict[str, tuple[float, float, float]]):
    """A run from rows of metrics and from figures (value, low, high) by benchmark."""
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.toml").write_text(config)
    for label, figures in benchmarks.items():
        (folder / "evaluation" / label).mkdir(parents=True)
        metrics = {name: dict(zip(("value", "low", "high"), one, strict=True)) for name, one in figures.items()}
        summary = {"benchmark": "charades_sta", "model": "m", "num_samples": 9, "metrics": metrics, "judge": "words"}
        (folder / "evaluation" / label / "metrics.json").write_text(json.dumps(summary))
    return read_run(folder)


def test_rows_are_compared_with_the_first(tmp_path):
    base = make(tmp_path / "base", test={"mIoU": (0.3, 0.25, 0.35), "R@0.5": (0.2, 0.1, 0.3)})
    near = make(tmp_path / "near", test={"mIoU": (0.33, 0.28, 0.38), "R@0.5": (0.2, 0.1, 0.3)})
    far = make(tmp_path / "far", test={"mIoU": (0.6, 0.55, 0.65)}, other={"acc": (0.9, 0.8, 1.0)})
    table = result_table([base, near, far])
    assert table.columns == {"test": ["mIoU", "R@0.5"], "other": ["acc"]} == table.main
    assert table.captions["test"] == "charades_sta, judged by words"
    first, second, third = (row.cells for row in table.rows)
    miou = ("test", "mIoU")
    assert first[miou].delta is None and not first[miou].best
    assert second[miou].delta == pytest.approx(0.03) and not second[miou].apart
    assert third[miou].delta == pytest.approx(0.3) and third[miou].apart and third[miou].best
    assert not second["test", "R@0.5"].best  # both the same
    assert third["other", "acc"].delta is None and not third["other", "acc"].best


def test_many_benchmarks_show_their_first_figures_side_by_side(tmp_path):
    figures = {f"metric{number}": (0.5, 0.4, 0.6) for number in range(5)}
    run = make(tmp_path / "run", **{f"benchmark{number}": figures for number in range(6)})
    table = result_table([run])
    assert [len(metrics) for metrics in table.columns.values()] == [5] * 6
    assert [len(metrics) for metrics in table.main.values()] == [2] * 6 and 2 * 6 <= MAX_COLUMNS < 3 * 6


def test_reasons_of_zeros_with_their_rates(tmp_path):
    rows = [
        {"step": step, "zeros/tracking/iou/no </answer>": 8 - step, "zeros/tracking/format/x": 1} for step in range(8)
    ]
    (first, second) = zero_rows([make(tmp_path / "run", *rows)])
    assert (first.task, first.part, first.reason, first.count) == ("tracking", "iou", "no </answer>", 36)
    assert (first.first_rate, first.last_rate) == (7.5, 1.5)
    assert second.count == 8


def test_phases_make_up_the_step(tmp_path):
    row = {"time/rollout_s": 6.0, "time/update_s": 3.0, "time/sync_s": 0.01, "time/total_s": 10.0, "time/judge_s": 0.0}
    (phases,) = phase_rows([make(tmp_path / "run", {"step": 1, **row}, {"step": 2, **row})])
    assert phases.total_s == 10
    assert [(name, round(share, 3)) for name, _, share in phases.phases] == [
        ("rollout", 0.6),
        ("update", 0.3),
        ("other", 0.1),
    ]


def test_key_figures(tmp_path):
    rows = [{"step": step, "reward/total": step / 20, "memory/peak_gb": 10 + step % 3} for step in range(1, 21)]
    figures = dict(key_figures(make(tmp_path / "run", *rows, config="[train]\nnum_steps = 40\n")))
    assert figures == {"Steps": "20 of 40", "Reward, first and last tenth": "0.075 → 0.975", "Peak memory": "12 GB"}


def test_settings_that_differ(tmp_path):
    one = make(tmp_path / "one", {"step": 1}, config="[train]\nrun_dir = 'a'\nseed = 0\n[grpo]\nkl_coef = 0.0\n")
    two = make(tmp_path / "two", {"step": 1}, config="[train]\nrun_dir = 'b'\nseed = 0\n")
    assert settings_that_differ([one, two]) == {"grpo.kl_coef": ["0.0", "-"]}
