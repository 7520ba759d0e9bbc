"""Devices of tensors on a machine with a GPU, checked on the CPU with the device tracker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vcr1.config.rendering import render_toml
from tests.device_tracker import WrongDevice, host_syncs, on_gpu, tracking_devices
from tests.training import workspace

ROOT = Path(__file__).parents[1]


def test_results_of_gpu_tensors_are_on_the_gpu_through_views_and_gradients() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    with tracking_devices():
        weight.data = weight.data.to("cuda")
        result = (torch.ones(4, 3, device="cuda") @ weight).relu()[1:].T.contiguous() * torch.tensor(2.0)
        result.sum().backward()
        assert weight.grad is not None
        assert all(map(on_gpu, (weight, result, weight.grad, torch.empty_like(result))))
        assert result.device.type == "cuda" and result.is_cuda
        assert not any(map(on_gpu, (result.cpu(), torch.zeros_like(result, device="cpu"), torch.ones(3))))


@pytest.mark.parametrize(
    "mistake",
    [
        lambda gpu, cpu: gpu + cpu,
        lambda gpu, cpu: torch.cat((gpu, cpu)),
        lambda gpu, cpu: gpu.index_select(0, cpu.long()),
        lambda gpu, cpu: cpu[gpu.long()],
        lambda gpu, cpu: gpu.numpy(),
    ],
    ids=["sum", "cat", "CPU index", "GPU index of a CPU tensor", "numpy"],
)
def test_operations_that_a_gpu_refuses_are_errors(mistake: Callable[[Tensor, Tensor], object]) -> None:
    with tracking_devices(), pytest.raises(WrongDevice):
        mistake(torch.zeros(2, device="cuda"), torch.zeros(2))


@pytest.mark.parametrize(
    "read",
    [Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.nonzero, lambda x: x[x > 0]],
    ids=["item", "tolist", "cpu", "nonzero", "mask"],
)
def test_host_syncs_are_counted_by_line(read: Callable[[Tensor], object]) -> None:
    with tracking_devices():
        x = torch.ones(1, device="cuda")
        before = host_syncs.copy()
        x *= 2
        assert host_syncs == before
        read(x)
    ((line, number),) = (host_syncs - before).items()
    assert line.startswith("tests/test_device_tracker.py:") and number == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU checks this itself")
@pytest.mark.parametrize(
    "family, stage, options",
    [
        (
            "qwen3_vl_moe",
            "sft",
            ["--recompute.granularity", "full", "--recompute.offload", "true", "--optimizer.state", "host"],
        ),
        ("qwen2_5_vl", "grpo", ["--grpo.epochs_per_rollout", "2"]),
    ],
)
def test_a_run_mixes_no_devices_and_the_model_never_waits_for_the_gpu(
    tmp_path: Path, family: str, stage: str, options: list[str]
) -> None:
    """Covers reading of weights, training, what is kept in host memory, NCCL's collectives and the export."""
    workspace.create(tmp_path, family=family, num_videos=4)
    config = workspace.config(tmp_path, stage, train={"num_steps": 1}, checkpoint={"export": "end"})
    (tmp_path / "run.toml").write_text(render_toml(config, documented=False))
    program = [sys.executable, "-m", "tests.device_tracker", "train", str(tmp_path / "run.toml"), *options]
    run = subprocess.run(
        program, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
    syncs = json.loads(run.stdout.splitlines()[-1])
    assert any(line.startswith("megatron_vcr1/training/optimizer.py") for line in syncs)  # reads the loss of a step
    assert not [line for line in syncs if line.startswith(("megatron_vcr1/model/", "kernels/"))]
