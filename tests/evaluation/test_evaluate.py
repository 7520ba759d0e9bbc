"""`vcr1 evaluate` on a model: the command, killed and resumed, and distributed over processes."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_vcr1.checkpoint.hf_import import import_checkpoint
from megatron_vcr1.cli.main import main
from megatron_vcr1.config.rendering import render_toml
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.manifest import read_manifest, write_manifest
from megatron_vcr1.data.templates import load_templates
from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation import evaluate
from megatron_vcr1.evaluation.evaluate import evaluate_model
from megatron_vcr1.evaluation.jobs import BenchmarkJob, read_jobs, templates_of_jobs
from megatron_vcr1.parallel import mesh
from megatron_vcr1.tasks import ChoiceTarget
from tests.commands import Process, run_vcr1, vcr1
from tests.gloo import GlooPool
from tests.limits import HANG_S
from tests.training import workspace

ROOT = Path(__file__).parents[2]
TASKS = ("temporal_grounding", "multiple_choice_qa", "captioning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and 12 videos, four for each of three tasks; one of them is damaged."""
    folder = workspace.create(tmp_path_factory.mktemp("evaluate"), tasks=TASKS, num_videos=12)
    damaged = read_manifest(folder / "data" / "train.jsonl")[0]
    assert isinstance(damaged.media[0].path, str)
    Path(damaged.media[0].path).write_bytes(b"no video")
    return folder


def run_config(folder: Path, run_dir: Path, *names: str, **sections: Any) -> RunConfig:
    manifest = folder / "data" / "train.jsonl"
    benchmarks = [{"name": name, "manifest": manifest, "thinking": False} for name in names or map(str, TASKS)]
    evaluation = {"benchmarks": benchmarks, "max_new_tokens": 6, "prompts_per_batch": 2}
    train = {"run_dir": run_dir} | sections.pop("train", {})
    return workspace.config(folder, "grpo", train=train, evaluate=evaluation | sections.pop("evaluate", {}), **sections)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def results(run_dir: Path) -> dict[str, Any]:
    """The content of all files of an evaluation, except for paths and times of the model."""
    files = sorted(run_dir.glob("evaluation/*/*.json*"))
    return {str(path.relative_to(run_dir)): path.read_text() for path in files if path.name != "settings.json"}


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, Any]:
    """The result of an undisturbed evaluation in one process."""
    evaluate_model(run_config(folder, folder / "whole"))
    return results(folder / "whole")


def test_the_command_gives_the_same_result(folder: Path, whole: dict[str, Any]) -> None:
    config = folder / "run.toml"
    config.write_text(render_toml(run_config(folder, folder / "elsewhere"), documented=False))
    other_process = ("--data.num_workers", 1)  # for decoding
    done = run_vcr1("evaluate", config, "--train.run_dir", folder / "cli", *other_process)
    assert done.returncode == 0, done.stderr
    assert results(folder / "cli") == whole
    assert "temporal_grounding: 4 samples" in done.stdout
    assert "judge: lexical" in done.stdout
    assert f"{folder / 'model'} is not trained by these settings" in done.stderr
    assert (
        f"temporal_grounding: {folder / 'model'}, without thinking, templates: {folder / 'templates.toml'}"
        in done.stderr
    )
    assert "multiple_choice_qa" in done.stderr  # a progress bar


def test_the_files_of_an_evaluation(folder: Path, whole: dict[str, Any]) -> None:
    manifest = folder / "data" / "train.jsonl"
    samples = read_manifest(manifest)
    for task in TASKS:
        here = folder / "whole" / "evaluation" / str(task)
        asked = [sample.id for sample in samples if sample.task is task]
        assert [row["id"] for row in rows(here / "predictions.jsonl")] == asked
        assert [row["id"] for row in rows(here / "samples.jsonl")] == asked
        details = json.loads((here / "metrics.json").read_text())
        assert details["label"] == details["benchmark"] == str(task)
        assert details["training_run"] is None
        assert (details["model"], details["thinking"]) == (str(folder / "model"), False)
        assert details["manifest"] == str(manifest)
        assert details["prompt"] == task and details["templates"] == str(folder / "templates.toml")
        assert details["num_samples"] == len(asked)
        assert set(details["metrics"]["F1" if task == "captioning" else next(iter(details["metrics"]))]) == {
            "value",
            "low",
            "high",
        }


def test_an_unreadable_video_is_counted_and_tried_again(folder: Path, whole: dict[str, Any]) -> None:
    damaged = read_manifest(folder / "data" / "train.jsonl")[0]
    here = folder / "whole" / "evaluation" / str(damaged.task)
    (bad,) = [row for row in rows(here / "predictions.jsonl") if "error" in row]
    assert bad["id"] == damaged.id
    assert "output" not in bad
    assert json.loads((here / "metrics.json").read_text())["num_unanswered"] == 1
    assert evaluate._indices_to_predict(*_open(run_config(folder, folder / "whole", str(damaged.task)))) == [0]


def _open(config: RunConfig) -> tuple[BenchmarkJob, evaluate.PredictionLog]:
    (job,) = read_jobs(config.evaluate.benchmarks, config.train.run_dir / "evaluation", key="evaluate.benchmarks")
    return job, evaluate._open_log(job, evaluate._settings(job, config), load_templates(config.data.templates))


def wait_for_end_of_session(session: int) -> None:
    """Wait until the decoding processes have noticed and exited."""
    deadline = time.monotonic() + HANG_S
    try:
        while time.monotonic() < deadline:
            os.killpg(session, 0)
            time.sleep(0.1)
    except ProcessLookupError:
        return
    os.killpg(session, signal.SIGKILL)
    pytest.fail("decoding processes have outlived the evaluation")


def test_videos_that_were_made_smaller_are_counted(folder: Path, tmp_path: Path) -> None:
    data = {"total_pixels": 64 * 28 * 28, "max_prompt_tokens": 100}
    evaluate_model(run_config(folder, tmp_path, "multiple_choice_qa", data=data))
    here = tmp_path / "evaluation" / "multiple_choice_qa"
    reductions = [row.get("reduction") for row in rows(here / "predictions.jsonl")]
    assert all("prompt tokens lowered to" in reduction for reduction in reductions)
    assert json.loads((here / "metrics.json").read_text())["num_reduced"] == len(reductions)


def vcr1_until_the_first_batch(*argv: object) -> int:
    """Run a command that evaluates; after its first batch, wait to be killed."""
    append = evaluate.PredictionLog.append

    def append_and_wait(*arguments: Any) -> None:
        append(*arguments)
        threading.Event().wait()

    with mock.patch.object(evaluate.PredictionLog, "append", append_and_wait):
        return vcr1(*argv)


def test_a_killed_evaluation_resumes_with_the_same_result(folder: Path, whole: dict[str, Any]) -> None:
    config = folder / "killed.toml"
    config.write_text(render_toml(run_config(folder, folder / "killed"), documented=False))
    process = Process(
        vcr1_until_the_first_batch,
        *("evaluate", config, "--data.num_workers", 1),
        stdout=Path(os.devnull),
        stderr=Path(os.devnull),
    )
    first = folder / "killed" / "evaluation" / str(TASKS[0]) / "predictions.jsonl"
    deadline = time.monotonic() + HANG_S
    while not (first.exists() and first.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(first.read_text().splitlines()) == 2
    wait_for_end_of_session(process.pid)
    with first.open("a") as file:
        file.write('{"id": "half a li')
    evaluate_model(run_config(folder, folder / "killed"))
    assert results(folder / "killed") == whole


def test_a_complete_evaluation_loads_no_model(
    folder: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [str(task) for task in TASKS[1:]]  # their videos are intact
    monkeypatch.setattr(evaluate, "_start_engine", lambda *_: pytest.fail("a model is loaded"))
    before = results(folder / "whole")
    assert len(evaluate_model(run_config(folder, folder / "whole", *names))) == 2
    assert results(folder / "whole") == before


def test_samples_with_edited_prompts_are_predicted_again(
    folder: Path, whole: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = tmp_path / "edited.jsonl"
    samples = [
        sample for sample in read_manifest(folder / "data" / "train.jsonl") if sample.task == "multiple_choice_qa"
    ]
    write_manifest(manifest, samples)
    source = {"name": "multiple_choice_qa", "manifest": manifest, "thinking": False}
    config = run_config(folder, tmp_path / "run", evaluate={"benchmarks": [source]})
    evaluate_model(config)
    predictions = tmp_path / "run" / "evaluation" / "multiple_choice_qa" / "predictions.jsonl"
    before = rows(predictions)
    other_video = replace(samples[0], media=samples[1].media)
    other_options = replace(samples[1], options=samples[1].options[::-1])
    other_truth = replace(samples[2], target=ChoiceTarget("B" if samples[2].target == ChoiceTarget("A") else "A"))
    write_manifest(manifest, [other_video, other_options, other_truth, *samples[3:]])
    job, log = _open(config)
    assert evaluate._indices_to_predict(job, log) == [0, 1]
    assert "edited.jsonl: the prompts of 2 samples have changed" in caplog.text
    evaluate_model(config)
    after = rows(predictions)
    assert after[2:] == before[2:]
    assert [row["id"] for row in after] == [row["id"] for row in before]
    assert all(new["prompt_digest"] != old["prompt_digest"] for new, old in zip(after[:2], before[:2], strict=True))


def test_an_imported_model_gives_the_same_predictions(folder: Path, whole: dict[str, Any]) -> None:
    import_checkpoint(folder / "model", folder / "imported")
    config = run_config(folder, folder / "from_imported", "captioning", model={"path": folder / "imported"})
    evaluate_model(config)
    predictions = "evaluation/captioning/predictions.jsonl"
    assert results(folder / "from_imported")[predictions] == whole[predictions]


@pytest.mark.parametrize(
    "sections, changed",
    [
        ({"evaluate": {"max_new_tokens": 7}}, "max_new_tokens"),
        ({"data": {"max_frames": 6}}, "data"),
        ({"model": {"dtype": "bfloat16"}}, "dtype"),
    ],
)
def test_predictions_of_other_settings_are_not_mixed(
    folder: Path, whole: dict[str, Any], sections: dict[str, Any], changed: str
) -> None:
    with pytest.raises(
        UserError, match=rf"captioning: holds predictions with another {changed}; give .* another label"
    ):
        evaluate_model(run_config(folder, folder / "whole", "captioning", **sections))


def test_samples_can_be_asked_like_those_of_another_task(folder: Path, whole: dict[str, Any]) -> None:
    table = {"name": "multiple_choice_qa", "prompt": "grounded_qa", "manifest": folder / "data/train.jsonl"}
    config = run_config(folder, folder / "glue", evaluate={"benchmarks": [table]})
    (result,) = evaluate_model(config)
    assert "accuracy" in result.summary.metrics and "mIoU" not in result.summary.metrics
    details = json.loads((folder / "glue/evaluation/multiple_choice_qa/metrics.json").read_text())
    assert (details["benchmark"], details["prompt"]) == ("multiple_choice_qa", "grounded_qa")
    (job,) = read_jobs(config.evaluate.benchmarks, config.train.run_dir / "evaluation", key="evaluate.benchmarks")
    asked = templates_of_jobs([job], load_templates(), key="evaluate.benchmarks")[job.label]
    assert "<glue>" in asked.text_of(job.samples[0], thinking=False)


def test_predictions_of_templates_of_the_package_are_not_mixed_with_others(folder: Path) -> None:
    def config(templates: str) -> RunConfig:
        return run_config(folder, folder / "preset", "captioning", data={"templates": templates})

    job, _ = _open(config("videochat_r1"))
    (job.folder / "predictions.jsonl").touch()
    _open(config("videochat_r1"))
    with pytest.raises(UserError, match="holds predictions with another templates"):
        _open(config("default"))


def test_predictions_of_another_model_are_not_mixed(folder: Path, whole: dict[str, Any]) -> None:
    weights = folder / "model" / "model.safetensors"
    before = weights.stat()
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(UserError, match="holds predictions with another weights"):
        evaluate_model(run_config(folder, folder / "whole", "captioning"))
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "benchmarks, message",
    [
        ([], "nothing to evaluate; add a table"),
        ([{"name": "coco"}], "coco: no such benchmark"),
        ([{"name": "captioning"}, {"name": "captioning"}], "benchmarks.1: label 'captioning' must be"),
        ([{"name": "captioning", "label": "../up"}], "label '../up' must be"),
        ([{"name": "captioning", "label": ".."}], "label '..' must be"),
        ([{"name": "tracking"}], "none of its 12 samples is for benchmark tracking"),
        ([{"name": "captioning", "prompt": "capt"}], "evaluate.benchmarks, captioning: prompt: .capt. is not one of"),
        ([{"name": "captioning", "prompt": "tracking"}], "prompts of tracking state .first_box, which samples of capt"),
    ],
)
def test_invalid_benchmarks_are_refused_before_anything_is_written(
    folder: Path, benchmarks: list[dict[str, Any]], message: str
) -> None:
    tables = [{"manifest": folder / "data" / "train.jsonl", **table} for table in benchmarks]
    with pytest.raises(UserError, match=message):
        evaluate_model(run_config(folder, folder / "never", evaluate={"benchmarks": tables}))
    assert not (folder / "never").exists()


def _evaluate_in(config: RunConfig) -> int:
    with mock.patch.object(mesh, "shutdown"):  # the pool keeps its process groups
        return len(evaluate_model(config))


@pytest.mark.xdist_group("gloo")
@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}], ids=str)
def test_distributed_evaluation_gives_the_same_result(
    gloo_pool: GlooPool, folder: Path, whole: dict[str, Any], parallel: dict[str, int]
) -> None:
    run_dir = folder / f"shared_{'_'.join(parallel)}"
    config = run_config(folder, run_dir, parallel=parallel)
    assert gloo_pool.run(_evaluate_in, config) == [3, 0, 0, 0]
    assert results(run_dir) == whole


def test_a_training_whose_settings_cannot_be_read_is_not_called_a_base_model(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = {"sources": [{"manifest": folder / "data/train.jsonl"}]}
    config = run_config(folder, tmp_path, "captioning", data=data)
    jobs = read_jobs(config.evaluate.benchmarks, tmp_path / "evaluation", key="evaluate.benchmarks")
    assert evaluate._announce(jobs, config)["captioning"] is not None
    assert "the model that their training starts from" in caplog.text
    caplog.clear()
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/config.toml").write_text("[[")
    trained = run_config(folder, tmp_path, "captioning", data=data, model={"path": tmp_path / "run/export"})
    assert evaluate._announce(jobs, trained) == {"captioning": None}
    assert "cannot be compared" in caplog.text and "starts from" not in caplog.text


@pytest.mark.parametrize("holds", ["checkpoints/step_1", "metrics.jsonl"])
def test_the_folder_of_a_training_run_accepts_only_its_own_models(
    folder: Path, tmp_path: Path, holds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    (run_dir / holds).mkdir(parents=True)
    config = tmp_path / "training.toml"
    config.write_text(render_toml(run_config(folder, run_dir, "captioning"), documented=False))
    assert main(["evaluate", str(config)]) == 2
    error = capsys.readouterr().err
    assert f"model.path = {folder / 'model'} is not its model" in error
    assert f"--model.path to {run_dir / 'export'}" in error
    assert not (run_dir / "evaluation").exists()


def test_models_of_the_run_and_folders_without_training_are_accepted(tmp_path: Path) -> None:
    run_dir, elsewhere = tmp_path / "run", tmp_path / "disk" / "step_1"
    evaluate.check_run_dir(run_dir, tmp_path / "model")  # the folder does not exist yet
    (run_dir / "evaluation").mkdir(parents=True)
    evaluate.check_run_dir(run_dir, tmp_path / "model")  # it holds only evaluations
    (run_dir / "checkpoints").mkdir()
    elsewhere.mkdir(parents=True)
    (run_dir / "checkpoints" / "step_1").symlink_to(elsewhere)
    (tmp_path / "link").symlink_to(run_dir)
    for model in (run_dir / "export", run_dir / "checkpoints" / "step_1", tmp_path / "link" / "export"):
        evaluate.check_run_dir(run_dir, model)
    with pytest.raises(UserError, match=r"set another --train\.run_dir"):
        evaluate.check_run_dir(run_dir, tmp_path / "run2")
