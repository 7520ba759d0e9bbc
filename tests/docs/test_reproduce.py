"""docs/reproduce.md has a line for every row of the paper's tables, with commands and configurations that are valid."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest

from megatron_vcr1.cli.main import build_parser, split_overrides
from megatron_vcr1.config.loading import load_config
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.evaluation.benchmarks import find_benchmark
from megatron_vcr1.report.paper_tables import TABLES, PaperTable, PublishedRow
from tests.docs.pages import ROOT

PAGE = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")
UNTRAINED = "not trained"
TASKS = {
    "charades_sta_train": "temporal_grounding",
    "got10k_train": "tracking",
    "nextgqa_val": "grounded_qa",
    "nextgqa_val_multiple_choice": "multiple_choice_qa",
    "fiber_1k": "captioning",
    "vidtab_quality_train": "quality",
}


@dataclass(frozen=True)
class Line:
    """A line of the page, with the row of the paper that it reproduces."""

    table: PaperTable
    row: PublishedRow
    method: str
    training: str
    evaluation: str
    numbers: str

    def __str__(self) -> str:
        return f"table {self.table.number}: {self.method}"


def lines_of(table: PaperTable) -> list[list[str]]:
    section = PAGE.split(f"## Table {table.number}: {table.title}\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    assert rows[0] == ["method", "training", "evaluation", "the paper's numbers"]
    return rows[2:]


LINES = [
    Line(table, row, *cells)
    for table in TABLES
    for row, cells in zip(table.rows, lines_of(table), strict=True)  # every row of the paper has a line
]


def parsed(command: str, name: str) -> RunConfig:
    """Check the command's arguments as the `vcr1` command does, and return its settings."""
    program, *words = shlex.split(command.strip("`"))
    arguments, overrides = split_overrides(words)
    args, unknown = build_parser().parse_known_args(arguments)
    assert (program, arguments[0], unknown) == ("vcr1", name, [])
    return load_config(ROOT / args.config, overrides)


def test_every_row_of_the_paper_has_a_line():
    assert [len(lines_of(table)) for table in TABLES] == [6, 6, 3, 11, 6, 6]


@pytest.mark.parametrize("line", LINES, ids=str)
def test_a_line_trains_and_evaluates_its_row(line):
    config = parsed(line.evaluation, "evaluate")
    assert config.evaluate.max_new_tokens == 2048
    assert {benchmark.thinking for benchmark in config.evaluate.benchmarks} == {"think" in line.row.test_prompt}
    evaluated = {name for benchmark in config.evaluate.benchmarks for name in (benchmark.name, benchmark.label)}
    for column, value in zip(line.table.columns, line.row.values, strict=True):
        assert value == "-" or evaluated & set(column.benchmarks), column
    for benchmark in config.evaluate.benchmarks:
        assert find_benchmark(benchmark.name)
        assert f"--out {benchmark.manifest}\n" in PAGE, "the page says how the manifest is made"
        if line.table.separates_glue:
            asks_for_glue = "grounded_qa" in (benchmark.prompt, find_benchmark(benchmark.name).task)
            assert asks_for_glue == ("glue" in line.row.test_prompt)
    if not line.row.training_prompt:
        assert line.training == UNTRAINED and "export" not in line.evaluation
        return
    training = parsed(line.training, "train")
    assert config.model.path == training.train.run_dir / "export" and config.train.run_dir == training.train.run_dir
    assert training.train.num_epochs == float(line.row.epochs)
    assert training.optimizer.decay == "linear"
    assert {source.thinking for source in training.data.sources} == {"think" in line.row.training_prompt}
    tasks = {TASKS[source.manifest.stem] for source in training.data.sources}
    assert ("grounded_qa" in tasks) == ("glue" in line.row.training_prompt)
    assert all(f"--out {source.manifest}\n" in PAGE for source in training.data.sources)
    if "SFT" in line.method:
        assert (training.train.stage, training.optimizer.learning_rate) == ("sft", 2e-5)
    else:
        assert (training.train.stage, training.optimizer.learning_rate) == ("grpo", 1e-6)
    assert ("Qwen2-VL" in str(training.model.path)) == (tasks == {"captioning"})


@pytest.mark.parametrize("line", LINES, ids=str)
def test_the_numbers_are_those_of_the_paper(line):
    pairs = zip(line.table.columns, line.row.values, strict=True)
    groups = [(title, list(group)) for title, group in groupby(pairs, key=lambda pair: pair[0].group)]
    printed = [
        f"{title} " + ", ".join(f"{column.title} {value}" for column, value in group)
        for title, group in groups
        if any(value != "-" for _, value in group)
    ]
    assert line.numbers == "; ".join(printed)


def test_every_configuration_of_the_paper_is_used():
    named = set(re.findall(r"examples/configs/paper/\w+\.toml", PAGE))
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples/configs/paper").iterdir()}
    assert named == files


@pytest.mark.parametrize("path", sorted((ROOT / "examples/configs/paper").iterdir()), ids=lambda path: path.stem)
def test_a_configuration_holds_only_what_differs(path: Path):
    text = path.read_text(encoding="utf-8")
    assert "extends" in text or path.stem == "sft_temporal_grounding"
    config = load_config(path)
    run_dir = Path("runs/paper") / path.stem if path.stem[:4] in ("grpo", "sft_") else Path("runs/baseline")
    assert config.train.run_dir == run_dir, "no two trainings share a folder"
