"""Where tensors lie when a GPU is there: as the accountant of devices tells it, on the CPU."""

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
from tests.device_accountant import WrongDevice, keeping_books, on_gpu, waits
from tests.training import workspace

ROOT = Path(__file__).parents[1]


def test_the_books_follow_what_is_computed_through_views_and_gradients() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    with keeping_books():
        weight.data = weight.data.to("cuda")
        product = (torch.ones(4, 3, device="cuda") @ weight).relu()[1:].T.contiguous() * torch.tensor(2.0)
        product.sum().backward()
        assert weight.grad is not None
        assert all(map(on_gpu, (weight, product, weight.grad, torch.empty_like(product))))
        assert product.device.type == "cuda" and product.is_cuda
        assert not any(map(on_gpu, (product.cpu(), torch.zeros_like(product, device="cpu"), torch.ones(3))))


@pytest.mark.parametrize(
    "mistake",
    [
        lambda gpu, cpu: gpu + cpu,
        lambda gpu, cpu: torch.cat((gpu, cpu)),
        lambda gpu, cpu: gpu.index_select(0, cpu.long()),
        lambda gpu, cpu: cpu[gpu.long()],
        lambda gpu, cpu: gpu.numpy(),
    ],
    ids=["sum", "cat", "index", "index of the GPU", "numpy"],
)
def test_what_a_gpu_refuses_is_an_error(mistake: Callable[[Tensor, Tensor], object]) -> None:
    with keeping_books(), pytest.raises(WrongDevice):
        mistake(torch.zeros(2, device="cuda"), torch.zeros(2))


@pytest.mark.parametrize(
    "read",
    [Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.nonzero, lambda x: x[x > 0]],
    ids=["item", "tolist", "cpu", "nonzero", "mask"],
)
def test_reading_from_the_gpu_is_counted_by_its_line(read: Callable[[Tensor], object]) -> None:
    with keeping_books():
        one = torch.ones(1, device="cuda")
        before = waits.copy()
        one *= 2
        assert waits == before
        read(one)
    ((line, number),) = (waits - before).items()
    assert line.startswith("tests/test_device_accountant.py:") and number == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU knows better")
@pytest.mark.parametrize(
    "family, stage, options",
    [
        ("qwen2_vl", "sft", ["--recompute.granularity", "full"]),
        ("qwen2_5_vl", "grpo", ["--grpo.epochs_per_rollout", "2"]),
    ],
)
def test_a_run_on_a_gpu_mixes_no_devices_and_the_model_never_waits(
    tmp_path: Path, family: str, stage: str, options: list[str]
) -> None:
    """From reading the weights to the export, the reference's weights on the host, NCCL's collectives among them."""
    workspace.create(tmp_path, family=family, num_videos=4)
    config = workspace.config(tmp_path, stage, train={"num_steps": 1}, checkpoint={"export": "end"})
    (tmp_path / "run.toml").write_text(render_toml(config, documented=False))
    program = [sys.executable, "-m", "tests.device_accountant", "train", str(tmp_path / "run.toml"), *options]
    run = subprocess.run(
        program, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
    reads = json.loads(run.stdout.splitlines()[-1])
    assert any(line.startswith("megatron_vcr1/training/optimizer.py") for line in reads)  # the loss of a step
    assert not [line for line in reads if line.startswith(("megatron_vcr1/model/", "kernels/"))]
