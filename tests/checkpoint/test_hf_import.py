from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from megatron_vcr1.checkpoint.hf_export import export_checkpoint
from megatron_vcr1.checkpoint.hf_import import import_checkpoint
from megatron_vcr1.checkpoint.new_directory import new_directory
from megatron_vcr1.checkpoint.torch_dist import read_chunk, read_metadata
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import model_layout, to_megatron
from tests.checkpoint.hf_dirs import contents, file_names, random_weights, small_config


def test_an_imported_model_contains_the_megatron_tensors(imported_dir: Path) -> None:
    config = small_config()
    weights = random_weights(config)
    layouts = model_layout(ModelConfig.from_dict(config))
    stored = read_metadata(imported_dir / "megatron")
    assert stored.keys() == layouts.keys()
    for key, layout in layouts.items():
        (chunk,) = stored[key].chunks
        assert torch.equal(read_chunk(imported_dir / "megatron", chunk), to_megatron(layout, weights))


def test_symbolic_links_in_a_download_cache_are_followed(hf_dir: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b/snapshots/0a1b"
    snapshot.mkdir(parents=True)
    for path in hf_dir.iterdir():
        blob = tmp_path / "models--a--b" / f"{hash(path.name):x}"
        (snapshot / path.name).symlink_to(shutil.copy(path, blob))
    import_checkpoint(snapshot, tmp_path / "imported")
    shutil.rmtree(tmp_path / "models--a--b")
    export_checkpoint(tmp_path / "imported", tmp_path / "exported")
    assert contents(tmp_path / "exported") == contents(hf_dir)


def _import_and_wait(hf_dir: Path, out: Path, started: Connection) -> None:
    def wait(*progress: int) -> None:
        started.send(True)
        time.sleep(600)

    import_checkpoint(hf_dir, out, progress=wait)


def test_leftovers_of_a_killed_import_are_removed_but_not_those_of_a_running_one(hf_dir: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_import_and_wait, args=(hf_dir, tmp_path / "out", theirs))
    process.start()
    started.recv()
    (partial,) = tmp_path.glob(".out.partial-*")
    with new_directory(tmp_path / "out", 0):
        assert partial.exists()
    (tmp_path / "out").rmdir()
    process.kill()
    process.join()
    assert partial.exists()
    import_checkpoint(hf_dir, tmp_path / "out")
    assert file_names(tmp_path) == ["hf", "out"]


def test_a_full_disk_leaves_no_output(hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="No space left on device"):
        import_checkpoint(hf_dir, tmp_path / "out")
    assert file_names(tmp_path) == ["hf"]


def test_a_truncated_file_leaves_no_output(hf_dir: Path, tmp_path: Path) -> None:
    shard = hf_dir / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: .* bytes, but its header describes"):
        import_checkpoint(hf_dir, tmp_path / "out")
    assert file_names(tmp_path) == ["hf"]
