from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vcr1_kernels import backend
from vcr1_kernels.backend import interpreter, use_triton

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
