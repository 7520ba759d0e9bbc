from __future__ import annotations

import json

import pytest

from megatron_vcr1.report.paper_rows import paper_rows, rows_json
from megatron_vcr1.report.run_record import read_runs
from tests.report.paper_runs import add_result, make_trained_run


def rows(*runs):
    return paper_rows(read_runs(runs))


def values(row):
    return [None if cell is None else round(100 * cell.estimate.value, 1) for cell in row.cells]


def deltas(row):
    return [None if cell is None or cell.delta is None else round(100 * cell.delta, 1) for cell in row.cells]


@pytest.fixture
def base(tmp_path):
    run = tmp_path / "baseline"
    add_result(run, "charades_sta", mIoU=0.29, R_at_0_3=0.447, R_at_0_5=0.242, R_at_0_7=0.111)
    add_result(run, "nextgqa", mIoU=0.154, accuracy=0.595)
    add_result(run, "videomme_short", accuracy=0.713)
    return run


def test_models_are_compared_with_the_baseline(tmp_path, base):
    joint = make_trained_run(tmp_path / "joint", ["temporal_grounding", "tracking", "grounded_qa"])
    add_result(joint, "charades_sta", f"{joint}/export", mIoU=0.608, R_at_0_5=0.717)
    add_result(joint, "got10k", f"{joint}/export", overlap=0.438)
    table = rows(joint, base)[1]
    assert [row.run for row in table] == ["baseline", "joint"], "the baseline comes first"
    assert values(table[0])[:8] == [29.0, 24.2, 11.1, None, None, None, 15.4, 59.5] and not any(deltas(table[0]))
    assert values(table[1])[:3] == [60.8, 71.7, None] and deltas(table[1])[:3] == [31.8, 47.5, None]
    assert values(table[1])[8] == 43.8 and deltas(table[1])[8] is None
    assert table[1].training.prompt == ("answer", "glue") and table[1].test_prompt == ("answer",)


def test_a_run_is_in_the_tables_that_compare_such_runs(tmp_path, base):
    tracking = make_trained_run(tmp_path / "tracking", ["tracking"], stage="sft", epochs=3)
    other = make_trained_run(tmp_path / "other", ["captioning", "tracking"])
    for run in (tracking, other):
        add_result(run, "got10k", f"{run}/export", overlap=0.4, R_at_0_5=0.3, R_at_0_7=0.1)
        add_result(run, "videomme_short", f"{run}/export", accuracy=0.7)
    found = rows(base, tracking, other)
    in_tables = {number: [row.run for row in table] for number, table in found.items()}
    assert in_tables[3] == ["baseline", "tracking", "other"] and in_tables[5] == []
    assert in_tables[2] == ["baseline", "other"], "a kind of run that the paper does not have is left out nowhere"
    assert found[3][1].training.num_epochs == 3


def test_glue_and_thinking_have_rows_of_their_own_in_table_4(tmp_path, base):
    add_result(base, "multiple_choice_qa", label="nextgqa_multiple_choice", accuracy=0.417)
    add_result(base, "videomme_short", label="videomme_short_glue", prompt="grounded_qa", accuracy=0.7)
    thinker = tmp_path / "baseline_thinking"
    add_result(thinker, "nextgqa", thinking=True, mIoU=0.202, accuracy=0.533)
    run = make_trained_run(tmp_path / "qa", ["grounded_qa"], thinking=True)
    add_result(run, "nextgqa", f"{run}/export", thinking=True, mIoU=0.329, accuracy=0.669)
    table = {row.test_prompt: values(row) for row in rows(base)[4]}
    assert table == {("answer",): [None, 41.7, 71.3], ("answer", "glue"): [15.4, 59.5, 70.0]}
    last = rows(base, thinker, run)[4][-1]
    assert last.test_prompt == ("think", "answer", "glue") and deltas(last) == [12.7, 13.6, None]
    assert values(rows(base)[1][0])[10] == 71.3, "other tables show Video-MME without glue"


def test_the_training_is_that_of_the_run_that_the_evaluation_recorded(tmp_path, base):
    run = make_trained_run(tmp_path / "runs/sta", ["temporal_grounding"], thinking=True)
    elsewhere = tmp_path / "evaluations/sta"
    add_result(elsewhere, "charades_sta", f"{run}/checkpoints/step_8", thinking=True, mIoU=0.59, training_run=run)
    add_result(elsewhere, "activitynet", f"{run}/export", thinking=True, mIoU=0.31, training_run=run)
    table = rows(base, elsewhere)[2]
    assert [row.training and row.training.thinking for row in table] == [None, True, True]
    assert deltas(table[2])[0] == 30.0, "without a baseline that thinks, the other one counts"


def test_a_run_is_compared_with_the_model_that_its_training_started_from(tmp_path, base):
    """One run started from a smaller model, and names it and itself relative to the folder where it was started."""
    small = tmp_path / "small"
    add_result(small, "charades_sta", str(tmp_path / "models/small"), mIoU=0.2)
    first = make_trained_run(tmp_path / "runs/first", ["temporal_grounding"], base="models/small")
    config = (first / "config.toml").read_text()
    (first / "config.toml").write_text(config.replace("[train]", "[train]\nrun_dir = 'runs/first'"))
    second = make_trained_run(tmp_path / "runs/second", ["temporal_grounding"], base=f"{first}/export")
    other = make_trained_run(tmp_path / "runs/other", ["temporal_grounding"], base="/models/another")
    for run, value in ((first, 0.5), (second, 0.6), (other, 0.7)):
        add_result(run, "charades_sta", f"{run}/export", mIoU=value)
    table = rows(base, small, first, second, other)[2]
    assert [(row.run, deltas(row)[0]) for row in table] == [
        *(("baseline", None), ("small", None), ("first", 30.0), ("second", 10.0), ("other", None))
    ]


def test_a_model_of_unknown_training_comes_after_the_untrained_ones(tmp_path, base):
    run = make_trained_run(tmp_path / "run", ["temporal_grounding"])
    for name, settings in (("damaged", "[["), ("removed", None)):
        training_run = tmp_path / name
        training_run.mkdir()
        if settings:
            (training_run / "config.toml").write_text(settings)
        add_result(tmp_path / f"of_{name}", "charades_sta", f"/{name}", mIoU=0.9, training_run=training_run)
    add_result(run, "charades_sta", f"{run}/export", mIoU=0.5)
    tables = rows(tmp_path / "of_damaged", tmp_path / "of_removed", base, run)
    table = tables[2]
    assert [(row.run, row.is_untrained, row.training is None, deltas(row)[0]) for row in table] == [
        ("baseline", True, True, None),
        ("of_damaged", False, True, None),
        ("of_removed", False, True, None),
        ("run", False, False, 21.0),
    ]
    (content,) = (content for content in rows_json(tables) if content["table"] == 2)
    assert [row["is_untrained"] for row in content["rows"]] == [True, False, False, False]


def test_tasks_of_a_run_whose_manifests_are_gone(tmp_path):
    run = make_trained_run(tmp_path / "run", ["tracking"])
    (run / "tracking.jsonl").unlink()
    add_result(run, "got10k", f"{run}/export", overlap=0.4)
    assert rows(run)[3][0].training.tasks == {"tracking"} and rows(run)[2] == []


@pytest.mark.parametrize("config", ["", "train = 3\ndata = 4", "[data]\nsources = [1]", "[data]\nsources = 2", "[["])
def test_damaged_settings_of_a_run(tmp_path, config):
    run = make_trained_run(tmp_path / "run", ["tracking"])
    add_result(run, "got10k", f"{run}/export", overlap=0.4)
    (run / "config.toml").write_text(config)
    assert values(rows(run)[3][0])[0] == 40.0


def test_json_has_the_same_numbers(tmp_path, base):
    content = json.loads(json.dumps(rows_json(rows(base))))
    assert [table["table"] for table in content] == [1, 2, 3, 4, 5, 6]
    cells = {(cell["benchmark"], cell["metric"]): cell["value"] for cell in content[0]["rows"][0]["cells"]}
    assert cells["Charades-STA", "mIoU"] == 0.29 and len(cells) == 6
