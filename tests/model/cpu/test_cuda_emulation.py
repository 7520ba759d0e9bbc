"""Behavior of torch and megatron-core with the emulation of CUDA installed."""

from __future__ import annotations

import threading

import pytest
import torch

from megatron_vcr1.model import cpu
from megatron_vcr1.model.cpu.cuda_emulation import CudaMeansCpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


@pytest.fixture(autouse=True)
def emulation() -> None:
    cpu.install()


def test_cuda_tensors_are_created_on_the_cpu() -> None:
    x = torch.ones(2, device="cuda")
    assert x.device.type == "cpu"
    assert x.cuda() is x
    assert torch.zeros_like(x, device=torch.device("cuda", 0)).device.type == "cpu"
    assert x.type() == "torch.FloatTensor"  # only megatron-core's optimizers see CUDA's names
    assert torch.cuda.current_device() == torch.device("cpu")


def test_a_second_install_enters_no_second_mode() -> None:
    depth = torch._C._len_torch_function_stack()
    cpu.install()
    assert torch._C._len_torch_function_stack() == depth >= 1


def test_the_mode_applies_to_one_thread_only() -> None:
    devices: list[str] = []

    def work() -> None:
        try:
            torch.ones(2, device="cuda")
        except (AssertionError, RuntimeError) as error:
            devices.append(type(error).__name__)
        with CudaMeansCpu():
            devices.append(torch.ones(2, device="cuda").device.type)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(devices) == 2 and devices[1] == "cpu"


def test_random_states_are_the_cpus() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    outer = torch.get_rng_state()
    tracker.add("test", 5)
    assert torch.equal(torch.get_rng_state(), outer)  # adding a state leaves the current one
    with tracker.fork("test"):
        first = torch.rand(3)
    with tracker.fork("test"):
        second = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), outer)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(6), torch.cat((first, second)))
    torch.set_rng_state(outer)
    with (
        pytest.raises(KeyError, match=r"'other' is not registered; call parallel\.mesh\.initialize"),
        tracker.fork("other"),
    ):
        pass
