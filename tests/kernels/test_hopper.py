"""Properties of the kernels, compiled for H100, H200 and B200 without a GPU by kernels/benchmarks/compiled.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.limits import HANG_S

SHARED_BYTES = 227 * 1024
ATTENTION = ("forward_kernel", "query_gradient_kernel", "key_gradient_kernel")


def _on_one_worker(capability: int) -> object:
    """All tests of a capability share its report, which takes half a minute to compile."""
    return pytest.param(capability, marks=pytest.mark.xdist_group(f"sm_{capability}"))


@pytest.fixture(scope="module", params=map(_on_one_worker, (90, 100)))
def capability(request: pytest.FixtureRequest) -> int:
    """Return the compute capability that the kernels are compiled for, times 10."""
    return request.param


@pytest.fixture(scope="module")
def report(capability: int) -> dict[str, dict[str, Any]]:
    kernels = Path(__file__).parents[2] / "kernels"
    script = kernels / "benchmarks" / "compiled.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(kernels), environment.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, script, str(capability)], env=environment, capture_output=True, text=True, timeout=HANG_S
    )
    assert process.returncode == 0 and "UserWarning" not in process.stderr, process.stderr
    return json.loads(process.stdout)


def test_every_kernel_compiles(report: dict[str, dict[str, Any]]) -> None:
    assert set(report) == {
        "_row_statistics_kernel",
        "_logit_gradient_kernel",
        "_token_loss_kernel",
        *ATTENTION,
        *(f"{name} float32" for name in ATTENTION),
        "_sum_parts_kernel",
        "_swiglu_kernel",
        "_swiglu_backward_kernel",
        "_rotate_kernel",
        "_qkv_kernel",
        "_frames_to_patches_kernel",
    }


def test_lengths_and_temperature_do_not_recompile(report: dict[str, dict[str, Any]]) -> None:
    assert {name: kernel["recompiled"] for name, kernel in report.items() if kernel["recompiled"]} == {}


def test_kernels_fit_into_shared_memory_and_registers(report: dict[str, dict[str, Any]]) -> None:
    assert max(kernel["shared_bytes"] for kernel in report.values()) <= SHARED_BYTES
    assert {name: kernel["spills"] for name, kernel in report.items() if kernel["spills"]} == {}


def test_no_kernel_needs_an_allocator(report: dict[str, dict[str, Any]]) -> None:
    """Triton would ask for it at the launch, for descriptors that a kernel makes: `triton.set_allocator`."""
    assert {name for name, kernel in report.items() if kernel["scratch_bytes"]} == set()


def test_swiglu_and_the_split_of_the_projection_move_16_bytes_at_a_time(report: dict[str, dict[str, Any]]) -> None:
    """Two versions of SwiGLU, with and without a bias, serve all published sizes at tensor-parallel sizes 1 to 8."""
    for name in ("_swiglu_kernel", "_swiglu_backward_kernel"):
        assert (report[name]["compiled"], report[name]["narrow_accesses"]) == (2, 0)
    assert report["_qkv_kernel"]["narrow_accesses"] == 0
    assert report["_frames_to_patches_kernel"]["narrow_accesses"] > 0  # it loads bytes


def test_registers_and_instructions_are_not_more_than_recorded(
    capability: int, report: dict[str, dict[str, Any]]
) -> None:
    file = Path(__file__).parents[2] / f"kernels/benchmarks/results/compiled_sm{capability}.json"
    if not file.exists():
        pytest.skip(f"nothing is recorded for compute capability {capability / 10}")
    recorded = json.loads(file.read_text(encoding="utf-8"))
    if recorded["triton"] != metadata.version("triton"):
        pytest.skip(f"recorded with triton {recorded['triton']}")
    for name, kernel in recorded["kernels"].items():
        assert report[name]["registers"] <= kernel["registers"], name
        assert report[name]["instructions"] <= 1.02 * kernel["instructions"], name


def test_attention_uses_the_tensor_cores(report: dict[str, dict[str, Any]]) -> None:
    """Float32 does not, in order to be exact; its tiles are so small that it still does not spill registers."""
    for name in ATTENTION:
        assert report[name]["tensor_cores"] and not report[f"{name} float32"]["tensor_cores"]
