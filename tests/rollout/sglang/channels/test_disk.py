"""Tests of the disk channel: the directory that servers load, and its removal."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_vcr1.rollout.sglang.channels.disk import DiskChannel
from tests.limits import HANG_S
from tests.rollout.sglang.fake_server import FakeServer


def test_a_server_loads_a_complete_directory_in_one_call(tmp_path: Path) -> None:
    model_dir, folder = tmp_path / "model", tmp_path / "weights"
    model_dir.mkdir()
    for name in ("config.json", "merges.txt", "model.safetensors.index.json"):
        (model_dir / name).write_text("{}")
    save_file({"old": torch.zeros(1)}, model_dir / "model.safetensors")
    weights = {"first": torch.arange(3.0), "second": torch.ones(2, 2)}
    with FakeServer(lambda path, body: (200, {"success": True})) as server:
        channel = DiskChannel(model_dir, folder, "2@run", timeout_s=HANG_S)
        channel.begin(server.url)
        for name, tensor in weights.items():
            channel.send(server.url, channel.prepare([(name, tensor)]))
        assert not server.requests
        channel.finish(server.url)
        assert server.requests == [
            ("/update_weights_from_disk", {"model_path": str(folder / "2@run"), "load_format": "auto"})
        ]
    loaded = {key: value for path in channel.directory.glob("*.safetensors") for key, value in load_file(path).items()}
    assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)
    files = {path.name for path in channel.directory.iterdir() if path.suffix != ".safetensors"}
    assert files == {"config.json", "merges.txt"}  # the index would name files that are not there


def test_a_second_attempt_starts_with_an_empty_directory_and_old_versions_are_removed(tmp_path: Path) -> None:
    model_dir, folder = tmp_path / "model", tmp_path / "weights"
    model_dir.mkdir()
    DiskChannel(model_dir, folder, "1@run", timeout_s=HANG_S).prepare([("w", torch.zeros(1))])
    DiskChannel(model_dir, folder, "2@run", timeout_s=HANG_S).prepare([("w", torch.zeros(1))])
    again = DiskChannel(model_dir, folder, "2@run", timeout_s=HANG_S)
    assert list(again.directory.iterdir()) == []
    again.remove_other_versions()
    assert list(folder.iterdir()) == [again.directory]
