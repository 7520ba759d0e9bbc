"""The comparison of an exported model with transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from demo.plan import TESTS
from demo.verify import write_comparison

pytestmark = pytest.mark.xdist_group("demo")


def test_transformers_gives_the_responses_of_vcr1_evaluate(out: Path) -> None:
    (verified,) = json.loads((out / "report.json").read_text())["export_in_transformers"]
    assert verified["num_answers"] == verified["num_equal"] > 0


def test_a_different_response_is_an_error(out: Path, tmp_path: Path) -> None:
    evaluation = tmp_path / "evaluation"
    for predictions in (out / "base-3" / "evaluation").rglob("predictions.jsonl"):
        rows = [json.loads(line) | {"output": "something else"} for line in predictions.read_text().splitlines()]
        copy = evaluation / predictions.parent.name / predictions.name
        copy.parent.mkdir(parents=True)
        copy.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tests = [out / "configs" / f"{test}.toml" for test in TESTS["base"][:1]]
    with pytest.raises(RuntimeError, match="something else"):
        write_comparison(out / "base-3" / "export", tests, evaluation, tmp_path / "result.json", num_samples=1)
    assert json.loads((tmp_path / "result.json").read_text())["num_equal"] == 0
