"""Renders the results of runs as the tables of the paper (`vcr1 report --layout paper`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from pathlib import Path

from megatron_vcr1.report.page import Report
from megatron_vcr1.report.paper_rows import PaperRow, is_base, paper_rows, rows_json
from megatron_vcr1.report.paper_tables import TABLES, Column
from megatron_vcr1.report.rendering import environment, made_with, write_text
from megatron_vcr1.report.run_record import RunRecord


def write_paper_report(
    runs: Sequence[RunRecord], out: Path, *, published: bool, json_path: Path | None = None
) -> Report:
    """Write the page, and optionally its numbers as JSON. Each file appears only when it is complete.

    Args:
        runs: the runs, each with the evaluations in its folder.
        out: the page.
        published: whether the tables also show the numbers that the paper prints.
        json_path: where to write the numbers; None does not write them.
    """
    rows = paper_rows(runs)
    notes = list(_notes(runs, rows))
    context = {
        "title": "The paper's tables",
        "runs": runs,
        "tables": [(table, _groups(table.columns), rows[table.number]) for table in TABLES],
        "starts": {table.number: _first_columns(table.columns) for table in TABLES},
        "published": published,
        "notes": notes,
        "written": datetime.now().astimezone(),
        "made_with": made_with(),
    }
    num_bytes = write_text(out, environment().get_template("paper.html.jinja").render(context))
    if json_path is not None:
        content = {"tables": rows_json(rows), "notes": notes}
        write_text(json_path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return Report(notes, 0, num_bytes)


def _groups(columns: Sequence[Column]) -> list[tuple[str, list[Column]]]:
    """Return the columns by benchmark, in their order."""
    return [(title, list(group)) for title, group in groupby(columns, key=lambda column: column.group)]


def _first_columns(columns: Sequence[Column]) -> set[int]:
    """Return the index of the first column of each benchmark."""
    return {index for index, column in enumerate(columns) if index == 0 or columns[index - 1].group != column.group}


def _notes(runs: Sequence[RunRecord], rows: Mapping[int, Sequence[PaperRow]]) -> Iterator[str]:
    all_rows = [row for table_rows in rows.values() for row in table_rows]
    trained = dict.fromkeys((row.run, row.training) for row in all_rows if row.training)
    for run_name, training in trained:
        if not any(is_base(row.model, training) for row in all_rows):
            base = training.base or "which its config.toml does not name"
            yield f"{run_name}: no result of the model that its training started from, {base}: no difference is shown"
    unknown = dict.fromkeys((row.run, row.model) for row in all_rows if not (row.training or row.is_untrained))
    for run_name, model in unknown:
        yield (
            f"{run_name}: it is not known how its model {model or 'of another program'} was trained, because the "
            "config.toml of its training cannot be read or was not recorded: no difference is shown"
        )
    shown = {row.run for row in all_rows}
    if without := [run.name for run in runs if run.name not in shown]:
        yield f"without a result of these benchmarks: {', '.join(without)}"
    for run in runs:
        for result in run.evaluations:
            if unjudged := result.details.get("num_unjudged"):
                yield f"{run.name}: evaluation/{result.label}: {unjudged} outputs could not be judged"
            if result.details.get("max_samples"):
                yield f"{run.name}: evaluation/{result.label}: only the first {result.num_samples} samples"
