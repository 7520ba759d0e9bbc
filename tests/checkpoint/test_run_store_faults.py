"""Saves and resumption with full disks, damaged files, changed settings and killed processes."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vcr1.checkpoint import run_lock, step_dirs
from megatron_vcr1.checkpoint.disk import checksum_of
from megatron_vcr1.checkpoint.hf_export import export_checkpoint
from megatron_vcr1.checkpoint.hf_import import import_checkpoint
from megatron_vcr1.checkpoint.run_store import RunStore
from megatron_vcr1.checkpoint.step_dirs import saved_steps
from megatron_vcr1.config.training_sections import CheckpointSection
from megatron_vcr1.data.packing import Group
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.packed_batch import pack
from tests.checkpoint.malicious_pickle import PickleThatCreatesFile
from tests.checkpoint.toy_run import ToyRun, train_until_killed
from tests.limits import HANG_S
from tests.model import tiny
from tests.ports import free_ports

pytestmark = [pytest.mark.usefixtures("single_process"), pytest.mark.one_lane]

# Saves in the background, and saves during which training waits.
MODES = [{"checkpoint": {"asynchronous": True}}, {"checkpoint": {"asynchronous": False}}]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "qwen2_vl"
    tiny.create("qwen2_vl", folder)
    return folder


@pytest.fixture
def saved(model_dir: Path, tmp_path: Path) -> ToyRun:
    """A run with checkpoints of steps 1 and 2."""
    run = ToyRun(model_dir, tmp_path / "checkpoints", {})
    for _ in range(2):
        run.train(1)
        run.save()
    run.store.finish()
    return run


def test_the_settings_decide_which_checkpoints_are_kept(model_dir: Path, tmp_path: Path) -> None:
    run = ToyRun(model_dir, tmp_path, {"checkpoint": {"keep_last": 2, "keep_every": 3}})
    for step in range(1, 9):
        run.steps = step
        run.save()
    run.store.finish()
    assert saved_steps(tmp_path) == [3, 6, 7, 8]
    assert sorted(os.listdir(tmp_path)) == [".lock", "step_3", "step_6", "step_7", "step_8"]


def test_content_is_durable_before_the_checkpoint_gets_its_name(saved: ToyRun, not_durable: list[str]) -> None:
    saved.train(1)
    saved.save()
    saved.store.finish()
    assert saved_steps(saved.store.path(3).parent) == [2, 3]
    assert not not_durable


def test_a_step_is_not_saved_twice(saved: ToyRun) -> None:
    before = saved.store.path(2).stat()
    saved.save()
    saved.store.finish()
    after = saved.store.path(2).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_transformers_computes_the_same_logits_from_an_exported_checkpoint(tmp_path: Path, family: str) -> None:
    import transformers

    tiny.create(family, tmp_path / "model")
    run = ToyRun(tmp_path / "model", tmp_path / "checkpoints", {})
    run.train(2)
    run.save()
    run.store.finish()
    export_checkpoint(run.store.path(2), tmp_path / "exported")
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {
        path.name for path in (tmp_path / "model").iterdir()
    }  # without the checkpoint's own files, so that another run can start from it
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    config = run.model.model_config
    prompt = tiny.prompt("iv", seed=3, timestamps=config.media.timestamps_as_text)
    responses = tiny.responses((5,), seed=4)
    expected = tiny.transformers_logits(theirs.eval(), config, prompt, responses[0])
    logits = run.model.logits(run.model(pack([Group("one", prompt, responses)], config)))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, file, message",
    [
        (_truncate, "megatron/__0_0.distcp", "bytes were written"),
        (_flip_a_bit, "megatron/__0_0.distcp", "CRC-32 differs"),
        (_flip_a_bit, "config.json", "CRC-32 differs"),
        (Path.unlink, "state.json", "it is missing"),
        (_truncate, "checksums.json", "damaged or missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(
    saved: ToyRun, caplog: pytest.LogCaptureFixture, damage: object, file: str, message: str
) -> None:
    damage(saved.store.path(2) / file)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        assert saved.resume() == 1
    assert f"step_2/{file}: " in caplog.text
    assert message in caplog.text
    assert "renamed to step_2.damaged" in caplog.text
    saved.train(1)
    saved.save()
    saved.store.finish()
    assert saved_steps(saved.store.path(2).parent) == [1, 2]


def test_pickles_cannot_run_code(saved: ToyRun, tmp_path: Path) -> None:
    path = saved.store.path(2)
    pickled = pickle.dumps(PickleThatCreatesFile(tmp_path / "ran"))
    checksums = json.loads((path / "checksums.json").read_text())
    for name in ("megatron/common.pt", "megatron/.metadata"):
        (path / name).write_bytes(pickled)
        checksums[name] = {"num_bytes": len(pickled), "crc32": checksum_of(path / name).crc32}
        (path / "checksums.json").write_text(json.dumps(checksums))
        if name == "megatron/common.pt":
            assert saved.resume() == 2  # the file is never loaded
        else:
            with pytest.raises(UserError, match=r"\.metadata: refused or damaged: "):
                saved.resume()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model": {"dtype": "bfloat16"}}, "resume with the model.dtype that it was saved with"),
        ({"model": {"freeze": []}}, r"optimizer\.state\.exp_avg\.\S+ is missing"),
    ],
)
def test_resuming_with_another_dtype_or_other_frozen_parts_is_refused(
    model_dir: Path, tmp_path: Path, settings: dict[str, dict[str, object]], message: str
) -> None:
    run = ToyRun(model_dir, tmp_path, {"model": {"freeze": ["vision_tower"]}})
    run.train(1)
    run.save()
    run.store.finish()
    with pytest.raises(UserError, match=message):
        ToyRun(model_dir, tmp_path, settings).resume()


def _resume_with_reference(model_dir: Path, directory: Path) -> int | None:
    run = ToyRun(model_dir, directory, {})
    run.store.pin_reference(run.model)
    step = run.resume()
    run.save()
    run.store.finish()
    return step


def test_a_run_resumes_with_the_weights_of_its_reference_only(model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    directory = tmp_path / "checkpoints"
    run = ToyRun(tmp_path / "model", directory, {})
    run.store.pin_reference(run.model)
    run.train(2)  # the learning rate of the first step is 0
    run.save()
    run.store.finish()

    shutil.move(tmp_path / "model", tmp_path / "moved")
    assert _resume_with_reference(tmp_path / "moved", directory) == 2
    import_checkpoint(tmp_path / "moved", tmp_path / "imported")
    assert _resume_with_reference(tmp_path / "imported", directory) == 2

    # The run's own export, and other weights under the path of the original model.
    export_checkpoint(run.store.path(2), tmp_path / "export")
    weights = load_file(tmp_path / "moved/model.safetensors")
    weights[next(name for name in weights if name.endswith("layernorm.weight"))][0] += 1
    shutil.copytree(tmp_path / "moved", tmp_path / "model")
    save_file(weights, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    for other in ("export", "model"):
        with pytest.raises(UserError, match="step_2: the run was started from other weights than those"):
            _resume_with_reference(tmp_path / other, directory)

    # Without a KL term the initial weights do not matter, and the fingerprint is kept for a later start.
    unpinned = ToyRun(tmp_path / "export", directory, {})
    assert unpinned.resume() == 2
    unpinned.train(1)
    unpinned.save()
    unpinned.store.finish()
    assert _resume_with_reference(tmp_path / "moved", directory) == 3
    with pytest.raises(UserError, match="the run was started from other weights"):
        _resume_with_reference(tmp_path / "export", directory)


@pytest.mark.parametrize("mode", MODES)
def test_a_failed_write_raises_and_keeps_earlier_checkpoints(saved: ToyRun, mode: dict[str, dict[str, bool]]) -> None:
    saved.store = RunStore(saved.store.path(2).parent, CheckpointSection.model_validate(mode["checkpoint"]))
    saved.train(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            saved.save()
            saved.store.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(saved.store.path(2).parent)) == [".lock", "step_1", "step_2"]
    saved.save()
    assert saved.store.latest() == 3


def test_the_error_of_a_full_disk_says_what_to_do(saved: ToyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    saved.train(1)
    monkeypatch.setattr(step_dirs.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(UserError, match="disk full while step 3 was saved; free space, or keep fewer") as raised:
        saved.save()
        saved.store.finish()
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.__cause__.errno == errno.ENOSPC
    assert saved.store.latest() == 2


def test_leftovers_of_a_dead_run_are_removed(saved: ToyRun) -> None:
    directory = saved.store.path(2).parent
    shutil.copytree(saved.store.path(2), directory / ".step_3.partial-0a1b")
    (directory / ".step_1.removed").mkdir()
    assert RunStore(directory, CheckpointSection()).latest() == 2
    assert sorted(os.listdir(directory)) == [".lock", "step_1", "step_2"]


def test_training_continues_if_old_checkpoints_cannot_be_removed(
    saved: ToyRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """This happens on NFS if a process of a dead run holds a file open: the file comes back under the name .nfs..."""
    directory = saved.store.path(2).parent

    def fails(path: Path, **_: object) -> None:
        if ".partial-" not in path.name:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(step_dirs.shutil, "rmtree", fails)
    saved.train(1)
    saved.save()
    saved.store.finish()
    assert saved_steps(directory) == [2, 3]
    (hidden,) = directory.glob(".step_1.removed-*")
    assert f"{hidden}: cannot be removed ([Errno 39] Directory not empty" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(step_dirs.os, "rename", _refuse_to_rename("step_2", os.rename))
        saved.train(1)
        saved.save()
        saved.store.finish()
    assert saved_steps(directory) == [2, 3, 4]
    assert f"{directory}/step_2: cannot be removed" in caplog.text
    RunStore(directory, CheckpointSection())  # starts although it cannot remove them
    monkeypatch.undo()
    saved.train(1)
    saved.save()
    saved.store.finish()
    assert sorted(os.listdir(directory)) == [".lock", "step_4", "step_5"]


def _refuse_to_rename(name: str, rename: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    def checked(source: Path, target: Path) -> None:
        if source.name == name:
            raise OSError(errno.EIO, "Input/output error", str(source))
        rename(source, target)

    return checked


@pytest.mark.parametrize("mode", MODES)
def test_processes_killed_at_any_moment_leave_an_intact_checkpoint(
    model_dir: Path, tmp_path: Path, mode: dict[str, dict[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill one or both of two ranks, which save every step, at random moments, and restart them.

    After each restart, the losses of steps that had been trained before must be the same. The first of three steps has
    been saved when the last one is reported, so each restart makes progress on a slow machine, too.
    """
    monkeypatch.setattr(run_lock, "LOCK_TIMEOUT_S", 0.0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    seen: dict[int, tuple[float, float]] = {}
    generator = random.Random(0)
    for _ in range(4):
        reports, theirs = context.Pipe(duplex=False)
        arguments = (free_ports(), model_dir, tmp_path, mode, theirs)
        ranks = [context.Process(target=train_until_killed, args=(rank, *arguments)) for rank in range(2)]
        for process in ranks:
            process.start()
        theirs.close()
        num_reports = 0
        deadline = time.monotonic() + HANG_S
        while time.monotonic() < deadline and reports.poll(HANG_S):
            step, *numbers = reports.recv()
            assert seen.setdefault(step, tuple(numbers)) == tuple(numbers)
            num_reports += 1
            if num_reports == 3:
                deadline = time.monotonic() + generator.uniform(0, 0.6)
        assert num_reports >= 3, "the ranks hang"
        with pytest.raises(UserError, match="another process is training here"):
            RunStore(tmp_path, CheckpointSection())
        for process in generator.choice(([ranks[0]], [ranks[1]], ranks)):
            process.kill()
        time.sleep(generator.uniform(0, 0.1))
        for process in ranks:
            process.kill()
            process.join()
    assert len(seen) > 4
    run = ToyRun(model_dir, tmp_path, mode)
    newest = run.resume()
    assert newest is not None and newest >= max(seen) - 2
    assert not list(tmp_path.glob("*.damaged"))
