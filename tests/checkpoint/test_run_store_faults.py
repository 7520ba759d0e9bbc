"""Full disks, damaged files, wrong settings and killed processes."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megatron_vcr1.checkpoint import run_store
from megatron_vcr1.checkpoint.disk import checksum_of
from megatron_vcr1.checkpoint.hf_export import export_checkpoint
from megatron_vcr1.checkpoint.run_store import RunStore, saved_steps
from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.config.training_sections import CheckpointSection
from megatron_vcr1.data.packing import Group
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.packed_batch import pack
from megatron_vcr1.parallel import mesh
from tests.checkpoint.toy_run import ToyRun, train_until_killed
from tests.model import tiny

# Written in the background, and before `save` returns.
MODES = [{"checkpoint": {"asynchronous": True}}, {"checkpoint": {"asynchronous": False}}]


@pytest.fixture(scope="module", autouse=True)
def _world() -> Iterator[None]:
    """Of one process; runs join it."""
    mesh.initialize(ParallelSection())
    yield
    mesh.shutdown()


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


def test_what_the_settings_say_is_kept(model_dir: Path, tmp_path: Path) -> None:
    run = ToyRun(model_dir, tmp_path, {"checkpoint": {"keep_last": 2, "keep_every": 3}})
    for run.steps in range(1, 9):
        run.save()
    run.store.finish()
    assert saved_steps(tmp_path) == [3, 6, 7, 8]
    assert sorted(os.listdir(tmp_path)) == [".lock", "step_3", "step_6", "step_7", "step_8"]


def test_everything_is_on_the_disk_before_it_gets_its_name(saved: ToyRun, not_on_disk: list[str]) -> None:
    saved.train(1)
    saved.save()
    saved.store.finish()
    assert saved_steps(saved.store.path(3).parent) == [2, 3]
    assert not not_on_disk


def test_a_step_is_saved_once(saved: ToyRun) -> None:
    before = saved.store.path(2).stat()
    saved.save()
    saved.store.finish()
    assert saved.store.path(2).stat() == before


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_trained_checkpoint_exports_to_what_transformers_computes_the_same_with(tmp_path: Path, family: str) -> None:
    import transformers

    tiny.create(family, tmp_path / "model")
    run = ToyRun(tmp_path / "model", tmp_path / "checkpoints", {})
    run.train(2)
    run.save()
    run.store.finish()
    export_checkpoint(run.store.path(2), tmp_path / "exported")
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {
        path.name for path in (tmp_path / "model").iterdir()
    }  # and not the checkpoint's own files, so that another run can begin with it
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "exported", dtype=torch.float32)
    config = run.model.model_config
    prompt, responses = tiny.prompt("iv", seed=3), tiny.responses((5,), seed=4)
    expected = tiny.transformers_logits(theirs.eval(), config, prompt, responses[0])
    logits = run.model.logits(run.model(pack([Group("one", prompt, responses)], config)))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def _cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _change_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage, file, message",
    [
        (_cut_off, "megatron/__0_0.distcp", "bytes were written"),
        (_change_a_bit, "megatron/__0_0.distcp", "CRC-32 differs"),
        (_change_a_bit, "config.json", "CRC-32 differs"),
        (Path.unlink, "state.json", "it is missing"),
        (_cut_off, "checksums.json", "damaged or missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    saved: ToyRun, caplog: pytest.LogCaptureFixture, damage: object, file: str, message: str
) -> None:
    damage(saved.store.path(2) / file)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        assert saved.resume() == 1
    assert f"step_2/{file}: " in caplog.text
    assert message in caplog.text
    assert "moved to step_2.damaged" in caplog.text
    saved.train(1)
    saved.save()
    saved.store.finish()
    assert saved_steps(saved.store.path(2).parent) == [1, 2]


class _RunsCode:
    """A pickle that creates a file when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.path), "w"))


def test_pickles_that_run_code_do_not_run(saved: ToyRun, tmp_path: Path) -> None:
    path = saved.store.path(2)
    pickled = pickle.dumps(_RunsCode(tmp_path / "ran"))
    checksums = json.loads((path / "checksums.json").read_text())
    for name in ("megatron/common.pt", "megatron/.metadata"):
        (path / name).write_bytes(pickled)
        checksums[name] = {"num_bytes": len(pickled), "crc32": checksum_of(path / name).crc32}
        (path / "checksums.json").write_text(json.dumps(checksums))
        if name == "megatron/common.pt":
            assert saved.resume() == 2  # nothing is read from it
        else:
            with pytest.raises(UserError, match=r"\.metadata: refused or damaged: .*it names .*open"):
                saved.resume()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"model": {"dtype": "bfloat16"}}, "continue with the model.dtype that it was saved with"),
        ({"model": {"freeze": []}}, r"optimizer\.state\.exp_avg\.\S+ is missing"),
    ],
)
def test_other_settings_are_refused(
    model_dir: Path, tmp_path: Path, settings: dict[str, dict[str, object]], message: str
) -> None:
    run = ToyRun(model_dir, tmp_path, {"model": {"freeze": ["vision_tower"]}})
    run.train(1)
    run.save()
    run.store.finish()
    with pytest.raises(UserError, match=message):
        ToyRun(model_dir, tmp_path, settings).resume()


@pytest.mark.parametrize("mode", MODES)
def test_a_failed_write_is_raised_and_leaves_the_old_ones(saved: ToyRun, mode: dict[str, dict[str, bool]]) -> None:
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


def test_a_full_disk_says_what_to_do(saved: ToyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    saved.train(1)
    monkeypatch.setattr(run_store.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    with pytest.raises(UserError, match="disk full while step 3 was saved; free space, or keep fewer") as raised:
        saved.save()
        saved.store.finish()
    assert isinstance(raised.value.__cause__, OSError)
    assert raised.value.__cause__.errno == errno.ENOSPC
    assert saved.store.latest() == 2


def test_what_a_dead_run_left_half_done_is_removed(saved: ToyRun) -> None:
    directory = saved.store.path(2).parent
    shutil.copytree(saved.store.path(2), directory / ".step_3.partial-0a1b")
    (directory / ".step_1.removed").mkdir()
    assert RunStore(directory, CheckpointSection()).latest() == 2
    assert sorted(os.listdir(directory)) == [".lock", "step_1", "step_2"]


def test_old_checkpoints_that_cannot_be_removed_are_named_and_tried_again(
    saved: ToyRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on NFS, where a dead run's process may have a file open: its name comes back as .nfs..."""
    directory = saved.store.path(2).parent

    def fails(path: Path, **_: object) -> None:
        if ".partial-" not in path.name:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(run_store.shutil, "rmtree", fails)
    saved.train(1)
    saved.save()
    saved.store.finish()
    assert saved_steps(directory) == [2, 3]
    (hidden,) = directory.glob(".step_1.removed-*")
    assert f"{hidden}: cannot be removed ([Errno 39] Directory not empty" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(run_store.os, "rename", _refuse_to_rename("step_2", os.rename))
        saved.train(1)
        saved.save()
        saved.store.finish()
    assert saved_steps(directory) == [2, 3, 4]
    assert f"{directory}/step_2: cannot be removed" in caplog.text
    RunStore(directory, CheckpointSection())  # starts beside what it cannot remove
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


def _hold_lock(directory: Path, holds: Connection, release: Connection) -> None:
    with (directory / ".lock").open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        holds.send(True)
        release.recv()


def test_the_lock_of_a_process_that_ends_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = multiprocessing.get_context("spawn")
    holds, theirs = context.Pipe(duplex=False)
    release, ours = context.Pipe(duplex=False)
    process = context.Process(target=_hold_lock, args=(tmp_path, theirs, release))
    process.start()
    holds.recv()
    with mock.patch.object(run_store.time, "sleep", lambda seconds: ours.send(True) or process.join()):
        assert RunStore(tmp_path, CheckpointSection()).latest() is None
    assert "another process holds this folder's lock; waiting 120 s" in caplog.text


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("mode", MODES)
def test_killed_at_any_moment_the_newest_checkpoint_is_whole(
    model_dir: Path, tmp_path: Path, mode: dict[str, dict[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks that save every step are killed at random moments, one of them or both; whatever runs of them report of
    a step is the same.
    """
    monkeypatch.setattr(run_store, "LOCK_PATIENCE_S", 0.0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.checkpoint.toy_run"])
    seen: dict[int, tuple[float, float]] = {}
    chance = random.Random(0)
    for _ in range(5):
        reports, theirs = context.Pipe(duplex=False)
        arguments = (_free_port(), model_dir, tmp_path, mode, theirs)
        ranks = [context.Process(target=train_until_killed, args=(rank, *arguments)) for rank in range(2)]
        for process in ranks:
            process.start()
        theirs.close()
        first = True
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and reports.poll(60):
            step, *numbers = reports.recv()
            assert seen.setdefault(step, tuple(numbers)) == tuple(numbers)
            if first:
                deadline, first = time.monotonic() + chance.uniform(0, 0.6), False
        assert not first, "the ranks have taken no step"
        with pytest.raises(UserError, match="another process is training here"):
            RunStore(tmp_path, CheckpointSection())
        for process in chance.choice(([ranks[0]], [ranks[1]], ranks)):
            process.kill()
        time.sleep(chance.uniform(0, 0.1))
        for process in ranks:
            process.kill()
            process.join()
    assert len(seen) > 3
    run = ToyRun(model_dir, tmp_path, mode)
    newest = run.resume()
    assert newest is not None and newest >= max(seen) - 2
    assert not list(tmp_path.glob("*.damaged"))
