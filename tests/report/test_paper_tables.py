from __future__ import annotations

import pytest

from megatron_vcr1.report.paper_tables import TABLES, Training

JOINT = frozenset({"temporal_grounding", "tracking", "grounded_qa"})


def accepted(stage: str, *tasks: str, thinking: bool = False) -> list[int]:
    training = Training(stage, frozenset(tasks), thinking, 1, "/base")
    return [table.number for table in TABLES if table.accepts(training)]


def test_the_tables_have_the_columns_of_the_paper_in_its_order():
    titles = {table.number: [f"{column.group} {column.title}" for column in table.columns] for table in TABLES}
    assert list(titles) == [1, 2, 3, 4, 5, 6]
    assert titles[1] == [
        *("Charades-STA mIoU", "Charades-STA R@0.5", "Charades-STA R@0.7"),
        *("ActivityNet mIoU", "ActivityNet R@0.5", "ActivityNet R@0.7", "NExTGQA mIoU", "NExTGQA acc"),
        *("GoT Overlap", "GoT R@0.5", "VideoMME Short-Avg", "MVBench Avg", "Perception Test Val"),
    ]
    assert titles[6] == titles[1][:-2]
    assert titles[3] == ["GoT Average overlap", "GoT R@0.5", "GoT R@0.7", "VideoMME Short-Avg"]
    assert [len(titles[number]) for number in (2, 4, 5)] == [9, 3, 4]


def test_every_published_row_has_a_value_for_each_column():
    assert [len(table.rows) for table in TABLES] == [6, 6, 3, 11, 6, 6]
    assert all(len(row.values) == len(table.columns) for table in TABLES for row in table.rows)
    values = {value for table in TABLES for row in table.rows for value in row.values}
    assert all(0 <= float(value) <= 100 for value in values - {"-", "N/A"})


@pytest.mark.parametrize(
    "stage, tasks, thinking, numbers",
    [
        ("grpo", JOINT, False, [1, 6]),
        ("grpo", JOINT, True, [1]),
        ("sft", ["temporal_grounding"], False, [1, 2]),
        ("grpo", ["temporal_grounding"], False, [2, 6]),
        ("grpo", ["temporal_grounding"], True, [2]),
        ("sft", ["tracking"], False, [1, 3]),
        ("sft", ["grounded_qa"], False, [1, 4]),
        ("grpo", ["multiple_choice_qa"], True, [4]),
        ("grpo", ["temporal_grounding", "grounded_qa"], False, [6]),
        ("grpo", ["quality"], False, [5]),
        ("sft", ["captioning"], False, [5]),
        ("grpo", ["captioning", "tracking"], False, []),
        ("sft", JOINT, False, []),
        ("grpo", [], False, []),
    ],
)
def test_which_models_a_table_compares(stage, tasks, thinking, numbers):
    assert accepted(stage, *tasks, thinking=thinking) == numbers


def test_training_prompts():
    assert Training("grpo", JOINT, True, 1, "/base").prompt == ("think", "answer", "glue")
    assert Training("sft", frozenset({"tracking"}), False, 1, "/base").prompt == ("answer",)
