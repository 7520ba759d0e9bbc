from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path

import convert_checkpoint
import pytest
import torch

from megatron_vcr1.checkpoint.hf_import import import_checkpoint
from megatron_vcr1.cli import convert
from megatron_vcr1.cli.main import main
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import mesh
from tests.checkpoint.hf_dirs import contents, random_weights, small_config, write_hf_dir
from tests.parallel.test_slurm import TASK


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    return write_hf_dir(tmp_path / "hf", small_config(), random_weights(small_config()))


@pytest.fixture
def imported_dir(hf_dir: Path, tmp_path: Path) -> Path:
    import_checkpoint(hf_dir, tmp_path / "imported")
    return tmp_path / "imported"


def test_import_export_and_verify(
    hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks = iter([100_000_000, 250_000_000, *[0] * 4])  # before and after the import, and in the other commands
    monkeypatch.setattr(convert, "peak_rss_bytes", lambda: next(peaks))
    imported, exported = str(tmp_path / "imported"), str(tmp_path / "exported")
    weights = random_weights(small_config())
    num_bytes = sum(tensor.nbytes for tensor in weights.values())

    assert main(["convert", "import", "--hf", str(hf_dir), "--out", imported, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] == num_bytes
    assert report["bytes_per_second"] == pytest.approx(num_bytes / report["seconds"], rel=0.1)
    assert (report["libraries_memory_mb"], report["peak_memory_mb"]) == (100, 250)

    assert convert_checkpoint.main(["export", "--checkpoint", imported, "--out", exported]) == 0
    assert "GB/s" in capsys.readouterr().out
    assert contents(Path(exported)) == contents(hf_dir)

    assert main(["convert", "verify", "--hf", exported, "--checkpoint", imported, "--no-log-probs"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        report["num_identical"]
        == report["num_tensors"]
        == len(report["tensors"])
        == len(random_weights(small_config()))
    )
    assert report["max_abs_difference"] == 0.0


def test_verify_exits_with_1_if_a_tensor_differs(
    imported_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_weights(small_config())
    weights["lm_head.weight"][0, 0] = torch.inf
    other = write_hf_dir(tmp_path / "other", small_config(), weights)
    assert main(["convert", "verify", "--hf", str(other), "--checkpoint", str(imported_dir), "--no-log-probs"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["num_tensors"] - report["num_identical"] == 1
    assert report["tensors"]["lm_head.weight"] is report["max_abs_difference"] is None  # infinite


def test_bad_input_is_named_and_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "import", "--hf", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vcr1: error: ") and "none/config.json: not found" in error
    with pytest.raises(SystemExit) as exit_:
        main(["convert", "import", "--hf", str(tmp_path)])
    assert exit_.value.code == 2


def test_a_disk_failure_exits_with_1(
    hf_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    assert main(["convert", "import", "--hf", str(hf_dir), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "failed: [Errno 28] No space left on device: '" in error and "__0_0.distcp'" in error
    assert not (tmp_path / "out").exists()


def test_the_tasks_of_srun_share_a_conversion(
    hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def join(backend: str, timeout: timedelta) -> None:
        raise UserError(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} starts {backend}")

    monkeypatch.setattr(mesh, "_join_ranks", join)
    monkeypatch.setattr(os, "environ", {**os.environ, **TASK})
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    assert main(["convert", "import", "--hf", str(hf_dir), "--out", str(tmp_path / "out")]) == 2
    assert "rank 10 of 16 starts gloo" in capsys.readouterr().err
