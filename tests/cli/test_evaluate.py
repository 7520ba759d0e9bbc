"""`vcr1 evaluate` on a file of predictions, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vcr1.cli.main import main
from megatron_vcr1.config.loading import load_config
from megatron_vcr1.data.manifest import write_manifest
from megatron_vcr1.evaluation.benchmarks import find_benchmark
from megatron_vcr1.rollout.engine import EngineError
from tests.evaluation.samples import captions, choices
from tests.judge.server import judge_server

ROOT = Path(__file__).parents[2]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A manifest of three questions and two captions, and predictions for all questions."""
    monkeypatch.chdir(tmp_path)
    write_manifest(tmp_path / "test.jsonl", [*choices("a", "b", "c"), *captions("d", "e")])
    write_predictions("A", "B", "<think>A")
    return tmp_path


def write_predictions(*outputs: str, ids: str = "abc") -> None:
    lines = [json.dumps({"id": id, "output": output}) + "\n" for id, output in zip(ids, outputs, strict=True)]
    Path("predictions.jsonl").write_text("".join(lines))


def score(*options: str, benchmark: str = "multiple_choice_qa", out: str = "metrics.json") -> int:
    files = ["--annotations", "test.jsonl", "--predictions", "predictions.jsonl", "--out", out]
    return main(["evaluate", "--benchmark", benchmark, *files, *options])


def test_a_file_of_predictions_is_scored(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score() == 0
    details = json.loads((files / "metrics.json").read_text())
    assert details["metrics"]["accuracy"]["value"] == pytest.approx(1 / 3)
    assert details["predictions"] == "predictions.jsonl"
    rows = [json.loads(line) for line in (files / "metrics.samples.jsonl").read_text().splitlines()]
    assert [(row["id"], row["metrics"]["accuracy"]) for row in rows] == [("a", 1), ("b", 0), ("c", 0)]
    shown = capsys.readouterr().out
    assert "33.3" in shown
    assert "accuracy 0: 1 wrong option, 1 no <answer>" in shown


def test_missing_predictions_are_refused_without_allow_missing(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_predictions("A", ids="a")
    assert score() == 2
    assert "no prediction for 2 of 3 samples: 'b', 'c'" in capsys.readouterr().err
    assert not (files / "metrics.json").exists()
    assert score("--allow-missing") == 0
    assert json.loads((files / "metrics.json").read_text())["num_unanswered"] == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "name a CONFIG.toml or a --run to evaluate a model"),
        (["--manifest", "test.jsonl"], "--manifest test.jsonl: it takes the place of CONFIG.toml, and needs --run"),
        (["--run", "runs/x", "--benchmark", "mvbench"], "runs/x: scoring a file takes no CONFIG.toml and no --run"),
        (["--run", "runs/x"], "--run runs/x: no config.toml in it; name the folder of a training run"),
        (["--benchmark", "mvbench"], "--annotations and --predictions and --out missing"),
        (["run.toml", "--benchmark", "mvbench"], "run.toml: scoring a file takes no CONFIG.toml"),
        (["run.toml", "--allow-missing"], "--allow-missing: only for scoring a file of predictions; leave it out"),
        (["--run", "runs/x", "--allow-extra"], "--allow-extra: only for scoring a file of predictions"),
        (["run.toml", "--task-modules", "mine"], "--task-modules: only for scoring a file of predictions"),
        (["absent.toml"], "absent.toml: no such file"),
    ],
)
def test_incompatible_arguments_are_refused(
    files: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["evaluate", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--judge.kind=magic"], "--judge.kind: Input should be"),
        (["--model.path=x"], "--model.path: scoring a file takes --judge.key VALUE only"),
    ],
)
def test_scoring_accepts_only_judge_settings(
    files: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    write_predictions("A dog.", "A cat.", ids="de")
    assert score(*options, benchmark="captioning") == 2
    assert message in capsys.readouterr().err


def test_out_must_be_a_json_file(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert score(out="metrics") == 2
    assert "name a file that ends with .json" in capsys.readouterr().err


def test_verdicts_of_a_language_model_are_cached(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_predictions("A dog barks.", "<answer>A dog barks. A cat runs.</answer>", ids="de")
    with judge_server() as server:
        section = server.section()
        options = ["--judge.kind", "openai", f"--judge.base_url={section.base_url}", "--judge.model", "reader"]
        assert score(*options, benchmark="captioning") == 0
        details = json.loads((files / "metrics.json").read_text())
        assert (details["judge"], details["metrics"]["recall"]["value"]) == ("reader", 0.75)
        num_asked = len(server.bodies)
        assert score(*options, benchmark="captioning") == 0
        assert len(server.bodies) == num_asked  # the judge's answers are cached next to metrics.json
        server.always = "503"
        write_predictions("A bird sings.", "It rains.", ids="de")
        capsys.readouterr()
        assert score(*options, "--judge.max_retries=0", benchmark="captioning") == 1
    assert "2 of 2 captions were not judged, more than judge.max_unscored_fraction allows" in capsys.readouterr().err


def test_predictions_are_kept_when_the_engine_fails(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_vcr1.evaluation import evaluate

    def fail(config: object) -> None:
        raise EngineError("no server answers; see sglang.log")

    monkeypatch.setattr(evaluate, "evaluate_model", fail)
    Path("run.toml").write_text('[model]\npath = "model"\n')
    assert main(["evaluate", "run.toml"]) == 1
    assert "no server answers; see sglang.log\nThe predictions so far are kept" in capsys.readouterr().err


def test_the_example_config_names_existing_benchmarks() -> None:
    config = load_config(ROOT / "examples" / "configs" / "evaluate.toml")
    assert {find_benchmark(source.name).name for source in config.evaluate.benchmarks} == {
        *("charades_sta", "activitynet", "nextgqa", "got10k", "videomme_short"),
        *("mvbench", "perception_test", "vidtab", "dream1k"),
    }
