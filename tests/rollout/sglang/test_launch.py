"""Tests of a server's command line and environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.rollout.placement import Placement
from megatron_vcr1.rollout.sglang.launch import ServerSpec, server_specs


def config(folder: Path, **sglang: Any) -> RunConfig:
    (folder / "model").mkdir()
    return RunConfig.model_validate(
        {"model": {"path": folder / "model"}, "train": {"run_dir": folder / "run"}, "sglang": sglang}
    )


def specs_of(run: RunConfig, **settings: Any) -> list[ServerSpec]:
    placement = Placement.from_section(run.sglang)
    return server_specs(run.sglang, run.model, placement, run_dir=run.train.run_dir, seed=run.train.seed, **settings)


def test_command_and_environment_follow_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as train.deterministic does
    run = config(tmp_path, num_servers=2, tensor=4, port=31000, server_args=["--log-level", "error"], python="/env/py")
    first, second = specs_of(run)
    assert first.command[:3] == ("/env/py", "-m", "sglang.launch_server")
    assert first.command[-2:] == ("--log-level", "error")
    text = " ".join(second.command)
    for part in ("--host 127.0.0.1", "--port 31001", "--tp 4", "--dtype bfloat16", "--enable-weights-cpu-backup"):
        assert part in text
    assert "--load-format dummy --weight-version none" in text  # the model's directory holds no safetensors
    assert (first.url, second.log.name) == ("http://127.0.0.1:31000", "server_31001.log")
    assert "--sleep-on-idle" in first.command
    [everywhere, _] = specs_of(run, host="0.0.0.0")
    assert "--host 0.0.0.0" in " ".join(everywhere.command) and everywhere.url == first.url
    [named, _] = specs_of(run, host="10.0.0.5")
    assert named.url == "http://10.0.0.5:31000"
    assert not {"RANK", "TORCHELASTIC_USE_AGENT_STORE", "CUBLAS_WORKSPACE_CONFIG"} & first.environment.keys()
    [place, *_] = first.environment["PYTHONPATH"].split(os.pathsep)
    assert [path.name for path in Path(place).iterdir()] == ["megatron_vcr1"]


def test_safetensors_are_loaded_if_there_are_any(tmp_path: Path) -> None:
    run = config(tmp_path, colocated=False)
    (tmp_path / "model" / "model.safetensors").touch()
    [spec] = specs_of(run)
    text = " ".join(spec.command)
    assert "--weight-version default" in text and "dummy" not in text and "memory-saver" not in text


@pytest.mark.parametrize(
    "argument, reason",
    [
        ("--enable-deterministic-inference", "it makes all responses of a group equal"),
        ("--dp-size=2", "weight sync does not reach a server's replicas"),
        ("--pp", "weight sync does not reach a server's replicas and stages"),
    ],
)
def test_an_unsupported_server_argument_is_rejected(tmp_path: Path, argument: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"sglang.server_args: remove {argument}: {reason}"):
        specs_of(config(tmp_path, server_args=["--log-level", "error", argument, "2"]))


@pytest.mark.parametrize("value", ["1", "True", "y"])
def test_graphs_of_the_vision_tower_need_exact_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    run = config(tmp_path)
    monkeypatch.setenv("SGLANG_VIT_ENABLE_CUDA_GRAPH", "on")  # SGLang does not know this value
    assert specs_of(run)
    monkeypatch.setenv("SGLANG_VIT_ENABLE_CUDA_GRAPH", value)
    with pytest.raises(UserError, match="SGLANG_VIT_ENABLE_CUDA_GRAPH is set, so add --enable-precise-embedding"):
        specs_of(run)
    arguments = ("--enable-precise-embedding-interpolation",)
    assert specs_of(run.model_copy(update={"sglang": run.sglang.model_copy(update={"server_args": arguments})}))


def test_colocated_servers_can_release_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(name, "expandable_segments:True")  # for training; the memory saver does not support it
    run = config(tmp_path)
    [spec] = specs_of(run)
    assert not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & spec.environment.keys()
    assert spec.environment["SGLANG_MEMORY_SAVER_CUDA_GRAPH"] == "1"  # releases CUDA graphs, too
    assert spec.environment["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] == "0"
    [alone] = specs_of(run.model_copy(update={"sglang": run.sglang.model_copy(update={"colocated": False})}))
    assert not {name for name in alone.environment if name.startswith("SGLANG_MEMORY_SAVER")}


def test_separate_servers_use_the_gpus_after_those_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    run = config(tmp_path, num_servers=2, tensor=2, colocated=False)
    last = specs_of(run, num_training_ranks=4)[-1].command
    assert last[last.index("--base-gpu-id") + 1] == "6"
    with pytest.raises(UserError, match="need GPUs 5 to 8, and this process sees 8"):
        specs_of(run, num_training_ranks=5)
