from __future__ import annotations

from megatron_vcr1.report.tables import (
    key_metrics,
    phase_rows,
    settings_that_differ,
    zero_rows,
)
from tests.report.runs import report_run


def test_reasons_for_zeros_are_counted_with_their_rates(tmp_path):
    rows = [
        {"step": step, "zero_rewards/tracking/iou/no </answer>": 8 - step, "zero_rewards/tracking/format/x": 1}
        for step in range(8)
    ]
    (first, second) = zero_rows([report_run(tmp_path / "run", *rows)])
    assert (first.task, first.part, first.reason, first.count) == ("tracking", "iou", "no </answer>", 36)
    assert (first.first_rate, first.last_rate) == (7.5, 1.5)
    assert second.count == 8


def test_phases_and_the_rest_add_up_to_the_step(tmp_path):
    row = {"time/rollout_s": 6.0, "time/update_s": 3.0, "time/sync_s": 0.01, "time/total_s": 10.0, "time/judge_s": 0.0}
    (phases,) = phase_rows([report_run(tmp_path / "run", {"step": 1, **row}, {"step": 2, **row})])
    assert phases.total_s == 10
    assert [(name, round(share, 3)) for name, _, share in phases.phases] == [
        ("rollout", 0.6),
        ("update", 0.3),
        ("other", 0.1),
    ]


def test_checkpoints_and_validations_are_added_to_the_total_of_a_step(tmp_path):
    row = {"time/update_s": 8.0, "time/total_s": 10.0, "time/save_s": 4.0, "time/validation_s": 6.0}
    (phases,) = phase_rows([report_run(tmp_path / "run", {"step": 1, **row})])
    assert phases.total_s == 20
    assert [(name, share) for name, _, share in phases.phases] == [
        *(("update", 0.4), ("save", 0.2), ("validation", 0.3), ("other", 0.1))
    ]


def test_key_metrics_of_a_run(tmp_path):
    rows = [{"step": step, "reward/total": step / 20, "memory/peak_gb": 10 + step % 3} for step in range(1, 21)]
    metrics = dict(key_metrics(report_run(tmp_path / "run", *rows, config="[train]\nnum_steps = 40\n")))
    assert metrics == {
        "Steps": "20 of 40",
        "Reward, first → last 10 % of steps": "0.075 → 0.975",
        "Peak memory": "12 GB",
    }


def test_settings_that_differ_are_listed(tmp_path):
    one = report_run(tmp_path / "one", {"step": 1}, config="[train]\nrun_dir = 'a'\nseed = 0\n[grpo]\nkl_coef = 0.0\n")
    two = report_run(tmp_path / "two", {"step": 1}, config="[train]\nrun_dir = 'b'\nseed = 0\n")
    assert settings_that_differ([one, two]) == {"grpo.kl_coef": ["0.0", "-"]}
