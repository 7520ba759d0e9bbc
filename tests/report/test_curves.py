from __future__ import annotations

from megatron_vcr1.report.curves import curve_sections, phase_chart
from megatron_vcr1.report.tables import phase_rows
from tests.report.runs import report_run


def charts(*runs):
    return {drawing.title: drawing for section in curve_sections(runs) for drawing in section.charts}


def test_a_run_has_the_same_colour_in_every_chart(tmp_path):
    sft = report_run(tmp_path / "sft", *({"step": step, "loss": 1 / step} for step in (1, 2)))
    grpo = report_run(tmp_path / "grpo", *({"step": step, "loss": 2 / step, "kl": 0.1 * step} for step in (1, 2)))
    drawn = charts(sft, grpo)
    assert [(stroke.label, stroke.colour) for stroke in drawn["Loss"].strokes] == [("sft", 0), ("grpo", 1)]
    assert [(stroke.label, stroke.colour) for stroke in drawn["KL to the reference"].strokes] == [("grpo", 1)]


def test_a_phase_has_the_same_colour_in_every_run(tmp_path):
    times = {"time/decode_s": 1.0, "time/judge_s": 1.0, "time/update_s": 2.0}
    judged = report_run(tmp_path / "judged", *({"step": step, **times} for step in (1, 2)))
    del times["time/judge_s"]
    plain = report_run(tmp_path / "plain", *({"step": step, **times} for step in (1, 2)))
    one, other = ({stroke.label: stroke.colour for stroke in phase_chart(run, "").strokes} for run in (judged, plain))
    assert one["update"] == other["update"] and len(set(one.values())) == 3


def test_a_constant_metric_is_listed_instead_of_drawn(tmp_path):
    rows = [{"step": 1, "loss": 2.0, "reward/grounded_qa/iou": 0.25}, {"step": 2, "loss": 1.0}]
    (reward, optimization) = curve_sections([report_run(tmp_path / "run", *rows)])
    assert not reward.charts and reward.constant == [("Grounded QA", "0.25")]
    assert [drawing.title for drawing in optimization.charts] == ["Loss"]


def test_validation_curves_stand_beside_the_reward_and_connect_their_steps(tmp_path):
    rows = [{"step": 0, "validation/clips/mIoU": 0.2, "validation/clips/num_samples": 9, "time/validation_s": 1.0}]
    for step in range(1, 5):
        rows.append({"step": step, "loss": 0.1, "reward/total": step / 10, "time/total_s": 2.0, "time/update_s": 2.0})
    rows.append({"step": 4, "validation/clips/mIoU": 0.4, "validation/clips/num_samples": 9, "time/validation_s": 3.0})
    run = report_run(tmp_path / "run", *rows)
    assert not run.problems and run.metrics.steps.tolist() == [0, 1, 2, 3, 4]
    assert [section.title for section in curve_sections([run])][:2] == ["Reward", "Validation"]
    (stroke,) = charts(run)["clips"].strokes
    assert (stroke.label, stroke.last) == ("mIoU", "0.4") and stroke.path.count("L") == 1  # a line from step 0 to 4
    (row,) = phase_rows([run])
    assert (row.total_s, dict((name, seconds) for name, seconds, _ in row.phases)) == (
        3.0,
        {"update": 2.0, "validation": 1.0},
    )
