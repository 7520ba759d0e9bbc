from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation.predictions import (
    Prediction,
    PredictionLog,
    extra_ids,
    match_predictions,
    read_predictions,
)
from tests.evaluation.samples import choices

SAMPLES = choices("a", "b", "c")
DIGESTS = {"a": "qa", "b": "qb", "c": "qc"}  # digests of the prompts


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lines_of_other_programs_are_read(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text('\ufeff{"id": "a", "output": "A", "n": 3}\n\n{"id": 2, "output": "x\u2028y"}\n', encoding="utf-8")
    assert read_predictions(path) == {"a": Prediction("a", "A"), "2": Prediction("2", "x\u2028y")}


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "not JSON"),
        ("[]", 'needs the keys "id" and "output"'),
        ('{"id": "a"}', 'needs the keys "id" and "output"'),
        ('{"output": "a"}', 'needs the keys "id" and "output"'),
        ('{"id": "a", "output": ["A"]}', '"output" must be a string'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"id": "z", "output": "A"}\n' + line + "\n")
    with pytest.raises(UserError, match=f"predictions.jsonl:2: {message}"):
        read_predictions(path)


def test_duplicate_ids_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"id": "a", "output": "A"}, {"id": "a", "output": "B"})
    with pytest.raises(UserError, match=r"p\.jsonl:2: id 'a' appears twice"):
        read_predictions(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_predictions(tmp_path / "absent.jsonl")


def match(predictions: dict[str, str], *, allow_missing: bool = False, allow_extra: bool = False) -> list[Prediction]:
    read = {id: Prediction(id, output) for id, output in predictions.items()}
    path = Path("p.jsonl")
    return match_predictions(read, SAMPLES, path, allow_missing=allow_missing, allow_extra=allow_extra)


def test_predictions_are_in_the_order_of_the_samples() -> None:
    assert [prediction.output for prediction in match({"c": "C", "a": "A", "b": "B"})] == ["A", "B", "C"]


def test_ids_must_match_the_samples() -> None:
    with pytest.raises(UserError, match=r"no prediction for 2 of 3 samples: 'a', 'c'; .*--allow-missing"):
        match({"b": "B"})
    with pytest.raises(UserError, match=r"1 of 4 ids do not belong to the benchmark's samples: 'x'; .*--allow-extra"):
        match({"a": "A", "b": "B", "c": "C", "x": "X"}, allow_missing=True)
    assert [prediction.error for prediction in match({"b": "B"}, allow_missing=True)] == [
        "no prediction",
        None,
        "no prediction",
    ]


def test_extra_predictions_can_be_left_out() -> None:
    everything = {"x": "X", "c": "C", "a": "A", "b": "B", "y": "Y"}
    assert [prediction.output for prediction in match(everything, allow_extra=True)] == ["A", "B", "C"]
    assert extra_ids({id: Prediction(id, "") for id in everything}, SAMPLES) == ["x", "y"]
    with pytest.raises(UserError, match=r"2 of 2 ids do not belong .*: 'x', 'y'; use other annotations"):
        match({"x": "X", "y": "Y"}, allow_extra=True, allow_missing=True)


def test_a_log_resumes_after_an_incomplete_line(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    log = PredictionLog(path, DIGESTS)
    log.append([Prediction("a", "A \ud800", num_tokens=3, finish_reason="stop"), Prediction("b", None, "no video")])
    with path.open("a") as file:
        file.write('{"id": "c", "out')
    log = PredictionLog(path, DIGESTS)
    assert list(log.done) == ["a"]  # what failed is tried again
    assert log.done["a"] == Prediction("a", "A \ud800", None, 3, "stop", prompt_digest="qa")
    log.append([Prediction("b", "B"), Prediction("c", None, "no video")])
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "b", "c"]
    assert read_predictions(path)["c"] == Prediction("c", None, "no video")
    log.rewrite(["c", "b"])
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["c", "b", "a"]


def test_predictions_for_changed_prompts_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    PredictionLog(path, DIGESTS).append([Prediction(id, id.upper()) for id in "abc"])
    with path.open("a") as file:
        file.write('{"id": "b2", "output": "for an unknown prompt"}\n')
    log = PredictionLog(path, {"a": "qa", "b": "another", "b2": "qb2"})
    assert list(log.done) == ["a", "c"]  # c is not evaluated now, but may be again
    assert log.num_outdated == 2
    assert list(PredictionLog(path, DIGESTS).done) == ["a", "c"]


def test_a_log_refuses_a_file_of_other_content(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text("some notes\n")
    with pytest.raises(UserError, match=r"predictions.jsonl:1: not JSON"):
        PredictionLog(path, DIGESTS)
    assert path.read_text() == "some notes\n"


HOSTILE = {
    "deep": "[" * 100_000,
    "long integer": '{"id": ' + "9" * 5_000 + "}",
    "surrogate": '"\\ud800',
    "nul": '{"id": "a\0"}',
}


@pytest.mark.parametrize("line", HOSTILE.values(), ids=HOSTILE)
def test_hostile_lines_are_user_errors_that_name_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"id": "z", "output": "A"}\n' + line + "\n")
    for read in (read_predictions, lambda path: PredictionLog(path, {})):
        with pytest.raises(UserError, match=r"predictions\.jsonl:2: not JSON"):
            read(path)


def test_a_byte_order_mark_is_ignored_and_a_fifo_refused(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text('\ufeff{"id": "z", "output": "A \\ud800"}\n', encoding="utf-8")
    assert read_predictions(path)["z"].output == "A \ud800"
    assert list(PredictionLog(path, {}).done) == ["z"]
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="not a regular file"):
        read_predictions(tmp_path / "pipe.jsonl")
