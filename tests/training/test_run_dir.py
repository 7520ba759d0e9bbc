from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from megatron_vcr1.config.loading import load_config
from megatron_vcr1.config.rendering import default_config
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.training.run_dir import RunDir


def _run_dir(path: Path) -> RunDir:
    run_dir = RunDir(path)
    run_dir.create()
    return run_dir


def _rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_resume_drops_the_records_of_later_steps_and_keeps_the_users_files(tmp_path: Path) -> None:
    run_dir = _run_dir(tmp_path / "run")
    run_dir.open(default_config(), 0)
    for step in (1, 2, 3):
        run_dir.add_metrics({"step": step, "loss": step / 10})
        run_dir.add_skipped(step, [(f"sample{step}", "damaged")])
        run_dir.write_rollouts(step, [{"step": step}])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed here
    (tmp_path / "run" / "rollouts" / "step_4.part").write_text("{")
    (tmp_path / "run" / "rollouts" / "figures").mkdir()
    (tmp_path / "run" / "rollouts" / "notes.txt").write_text("keep me")
    run_dir.open(default_config(), 2)
    assert _rows(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.2}]
    assert [row["id"] for row in _rows(tmp_path / "run" / "skipped.jsonl")] == ["sample1", "sample2"]
    kept = sorted(file.name for file in (tmp_path / "run" / "rollouts").iterdir())
    assert kept == ["figures", "notes.txt", "step_1.jsonl", "step_2.jsonl"]


def test_resume_drops_later_validations(tmp_path: Path) -> None:
    run_dir = _run_dir(tmp_path)
    run_dir.open(default_config(), 0)
    for step in (0, 1, 2):
        run_dir.add_metrics({"step": step, "validation/a/mIoU": 0.5})
        run_dir.add_metrics({"step": step + 1, "loss": 0.5})
        run_dir.add_skipped(step, [("sample", "damaged")], benchmark="a")
        (tmp_path / "validation" / f"step_{step}" / "a").mkdir(parents=True)
    (tmp_path / "validation" / "notes").mkdir()
    run_dir.open(default_config(), 2, 1)  # a signal ended the run before step 2 was validated
    assert [(row["step"], "loss" in row) for row in _rows(tmp_path / "metrics.jsonl")] == [
        (0, False),
        (1, True),
        (1, False),
        (2, True),
    ]
    assert [row["step"] for row in _rows(tmp_path / "skipped.jsonl")] == [0, 1]
    assert sorted(path.name for path in (tmp_path / "validation").iterdir()) == ["notes", "step_0", "step_1"]
    run_dir.open(default_config(), 0)  # the initial model is validated again
    assert _rows(tmp_path / "metrics.jsonl") == [] and not (tmp_path / "validation" / "step_0").exists()


def test_row_that_ends_within_a_character_is_dropped(tmp_path: Path) -> None:
    run_dir = _run_dir(tmp_path)
    run_dir.open(default_config(), 0)
    run_dir.add_skipped(1, [("é", "damaged")])
    skipped = tmp_path / "skipped.jsonl"
    skipped.write_bytes(skipped.read_bytes() + '{"step": 2, "id": "é'.encode()[:-1])
    run_dir.open(default_config(), 1)
    assert [row["id"] for row in _rows(skipped)] == ["é"]


def test_half_a_surrogate_pair_can_be_recorded(tmp_path: Path) -> None:
    run_dir = _run_dir(tmp_path)
    run_dir.open(default_config(), 0)
    run_dir.write_rollouts(1, [{"step": 1, "text": "é \ud83d"}])
    assert _rows(tmp_path / "rollouts" / "step_1.jsonl") == [{"step": 1, "text": "é \ud83d"}]


def test_recorded_settings_load_back(tmp_path: Path) -> None:
    _run_dir(tmp_path).open(default_config(), 0)
    assert load_config(tmp_path / "config.toml") == default_config()


def test_changed_settings_are_logged_and_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir, before = _run_dir(tmp_path), default_config()
    after = RunConfig.model_validate(
        {
            **before.model_dump(),
            "train": {"num_steps": 9},
            "data": {"sources": [{"manifest": "other.jsonl"}]},
        }
    )
    run_dir.open(before, 0)
    with caplog.at_level("INFO"):
        run_dir.open(before, 3)
        assert "changed" not in caplog.text
        run_dir.open(after, 4)
    assert "train.num_steps = 9 (was None)" in caplog.text
    starts = _rows(tmp_path / "starts.jsonl")
    assert [row["step"] for row in starts] == [0, 3, 4] and starts[1]["changed"] == {}
    changed = starts[2]["changed"]
    assert isinstance(changed, dict) and changed.keys() == {"train.num_steps", "data.sources"}
    assert changed["data.sources"] == [None, [{"manifest": "other.jsonl", "thinking": True, "rewards": []}]]
    assert load_config(tmp_path / "config.toml") == after


def test_numbers_that_are_not_finite_are_recorded_as_null(tmp_path: Path) -> None:
    run_dir = _run_dir(tmp_path)
    run_dir.open(default_config(), 0)
    run_dir.add_metrics({"step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    assert _rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "grad_norm": None}]


def test_folder_that_cannot_be_written_to_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"train\.run_dir"):
        _run_dir(tmp_path / "file" / "run")


def test_exports_of_single_steps_are_not_removed(tmp_path: Path) -> None:
    run_dir = _run_dir(tmp_path)
    (run_dir.export / "step_3").mkdir(parents=True)
    with pytest.raises(UserError, match="holds exports of single steps: move them elsewhere"):
        run_dir.remove_old_export(run_dir.export)
    assert (run_dir.export / "step_3").is_dir()


def test_exports_of_single_steps_are_not_mixed_with_an_older_export(tmp_path: Path) -> None:
    run_dir = _run_dir(tmp_path)
    run_dir.export.mkdir()
    (run_dir.export / "model.safetensors").write_text("")
    with pytest.raises(UserError, match=r"holds an export that .* does not update: move its files"):
        run_dir.remove_old_export(run_dir.export_dir(3, "always"))
    assert (run_dir.export / "model.safetensors").exists()
    (run_dir.export / "model.safetensors").unlink()
    run_dir.remove_old_export(run_dir.export_dir(3, "always"))


def test_full_disk_error_names_the_file(tmp_path: Path) -> None:
    run_dir = _run_dir(tmp_path)
    run_dir.open(default_config(), 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"/metrics\.jsonl'"):
            run_dir.add_metrics({"step": 1, **{f"metric {number}": 1.0 for number in range(99)}})
        with pytest.raises(OSError, match=r"/step_1\.jsonl'"):
            run_dir.write_rollouts(1, [{"text": "x" * 2000}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
