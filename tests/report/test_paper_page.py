from __future__ import annotations

import argparse
import json
import re

import pytest

from megatron_vcr1.cli.main import report as command
from megatron_vcr1.errors import UserError
from tests.report.paper_runs import add_result, make_trained_run


def report(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["report", *map(str, arguments)])
    return args.run(args)


@pytest.fixture
def runs(tmp_path):
    base = tmp_path / "baseline"
    add_result(base, "charades_sta", mIoU=0.29, R_at_0_3=0.447, R_at_0_5=0.242, R_at_0_7=0.111)
    run = make_trained_run(tmp_path / "sta_3_epochs", ["temporal_grounding"], thinking=True, epochs=3)
    add_result(run, "charades_sta", f"{run}/export", thinking=True, mIoU=0.613, R_at_0_3=0.831, R_at_0_5=0.728)
    return base, run


def text_of(html: str) -> str:
    body = html[html.index("<body>") :].replace("<wbr>", "")
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def table(html: str, number: int) -> str:
    return text_of("<body>" + html.split(f'<section id="table{number}">')[1].split("</section>")[0])


def test_the_page_shows_the_tables_in_percent(runs, tmp_path, capsys):
    out = tmp_path / "pages/paper.html"
    assert report(*runs, "--layout", "paper", "--out", out, "--json", tmp_path / "paper.json") == 0
    html = out.read_text()
    assert "sta_3_epochs GRPO: temporal grounding 3 think + answer think + answer 61.3 (+32.3)" in table(html, 2)
    assert "R@0.3" in table(html, 2) and "R@0.3" not in table(html, 1)
    assert table(html, 3).endswith("None of the runs has a result for this table.")
    assert "58.7" not in html and "<script" not in html
    assert len(json.loads((tmp_path / "paper.json").read_text())["tables"]) == 6
    assert str(out) in capsys.readouterr().out


def test_the_published_numbers_are_shown_on_request(runs):
    base, _ = runs
    assert report(base, "--layout", "paper", "--published") == 0
    html = (base / "paper.html").read_text()
    assert html.count('class="published"') == 38
    assert "GRPO (paper) 1 answer answer 58.7 80.9 67.7 45.4" in table(html, 2)


def test_a_missing_baseline_is_named(runs, capsys):
    _, run = runs
    assert report(run, "--layout", "paper") == 0
    error = capsys.readouterr().err
    assert "sta_3_epochs: no result of the model that its training started from, /models/base: no difference" in error
    (run / "config.toml").write_text("[[")
    assert report(run, "--layout", "paper") == 0
    assert f"sta_3_epochs: it is not known how its model {run}/export was trained" in capsys.readouterr().err


def test_names_are_escaped(tmp_path):
    run = tmp_path / "<img src=x>"
    add_result(run, "charades_sta", "<script>", mIoU=0.5)
    assert report(run, "--layout", "paper") == 0
    html = (run / "paper.html").read_text()
    assert "<img" not in html and "<script" not in html and "&lt;script&gt;" in html


def test_published_needs_the_layout(runs):
    with pytest.raises(UserError, match="--published needs --layout paper"):
        report(runs[0], "--published")
