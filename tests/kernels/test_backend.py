from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vcr1_kernels import backend, mrope
from vcr1_kernels.backend import interpreter, on_its_gpu, use_triton

from tests.limits import HANG_S

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, triton compiles its kernels")


def _run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new process, without TRITON_INTERPRET."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2] / "kernels")
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=HANG_S)


def test_cpu_tensors_use_pytorch() -> None:
    assert not use_triton(torch.zeros(1))


@without_gpu
def test_cpu_tensors_use_triton_inside_the_interpreter() -> None:
    with pytest.raises(ZeroDivisionError), interpreter():
        assert use_triton(torch.zeros(1)) and use_triton(torch.zeros(1, dtype=torch.uint8))
        assert not use_triton(torch.zeros(1, dtype=torch.float64))
        with interpreter():
            pass
        assert use_triton(torch.zeros(1))  # the inner block restored the state of the outer block
        raise ZeroDivisionError
    assert not use_triton(torch.zeros(1))


def test_interpreter_without_the_environment_variable_raises() -> None:
    process = _run_python("import vcr1_kernels.backend as b\nwith b.interpreter(): pass")
    assert process.returncode != 0 and "set TRITON_INTERPRET=1" in process.stderr


def test_importing_the_package_does_not_import_triton() -> None:
    process = _run_python("import sys, vcr1_kernels; assert 'triton' not in sys.modules, 'triton was imported'")
    assert process.returncode == 0, process.stderr


def test_missing_triton_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    assert not backend._triton_is_installed.__wrapped__()
    assert "triton is not installed" in caplog.text


def test_launches_make_the_gpu_of_their_tensor_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current = ["cuda:0"]

    @contextlib.contextmanager
    def switch(device: str) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", switch)
    tensor: Any = SimpleNamespace(is_cuda=True, device="cuda:1")
    assert on_its_gpu(lambda tensor: current[-1])(tensor) == "cuda:1"
    assert on_its_gpu(lambda tensor: current[-1])(torch.zeros(1)) == current[-1] == "cuda:0"


def test_every_launch_is_decorated() -> None:
    pytest.importorskip("triton")
    package = importlib.import_module("vcr1_kernels.triton_ops")
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    launches = [function for module in modules for name, function in vars(module).items() if name.startswith("launch_")]
    assert len(launches) >= 11
    assert [function.__qualname__ for function in launches if inspect.unwrap(function) is function] == []


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_kernels_run_on_a_gpu_that_is_not_the_current_one() -> None:
    query, table = torch.randn(3, 2, 8, device="cuda:1"), torch.randn(3, 8, device="cuda:1")
    rotated, _ = mrope(query, query, table, table, inplace=False)
    expected, _ = mrope(query.cpu(), query.cpu(), table.cpu(), table.cpu(), inplace=False)
    torch.testing.assert_close(rotated.cpu(), expected)
