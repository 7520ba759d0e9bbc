"""Importing any module of the project changes nothing in the process.

The test runs this file as a program in a fresh process, since the tests themselves have prepared torch for the CPU. It
compares snapshots of the process before and after it has imported every module, and prints the differences as JSON.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[1]
OPTIONAL_PACKAGES = {"apex", "datasets", "flash_attn", "nvidia", "openai", "sglang", "transformer_engine", "triton"}
# The modules that model.cpu patches, and torch itself.
WATCHED = (
    "torch",
    "torch.cuda",
    "torch.cuda.nvtx",
    "megatron.core.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.tensor_parallel.layers",
    "megatron.core.tensor_parallel.random",
)


def test_importing_every_module_changes_nothing_in_the_process() -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"}
    program = subprocess.run(
        [sys.executable, "-W", "ignore", __file__], env=environment, capture_output=True, text=True, check=False
    )
    assert program.returncode == 0, program.stderr
    result = json.loads(program.stdout.splitlines()[-1])
    assert result["num_imported"] > 100
    assert result["changes"] == []


def module_names() -> list[str]:
    """Return the names of all modules of megatron_vcr1 and vcr1_kernels."""
    names = []
    for root, package in ((ROOT, "megatron_vcr1"), (ROOT / "kernels", "vcr1_kernels")):
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def snapshot() -> dict[str, Any]:
    """Return the state of this process that a module might change while it is imported, by name."""
    import torch

    state: dict[str, Any] = {f"os.environ[{key}]": value for key, value in os.environ.items()}
    state |= {f"handler of signal {int(number)}": signal.getsignal(number) for number in signal.valid_signals()}
    state |= {
        "torch function modes": torch._C._len_torch_function_stack(),
        "default dtype": torch.get_default_dtype(),
        "default device": str(torch.get_default_device()),
        "gradients enabled": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "random state": torch.get_rng_state().tolist(),
    }
    for name in WATCHED:
        module = sys.modules[name]
        # Submodules appear in a package's namespace as they are imported, which is not a change of state.
        state |= {f"{name}.{key}": value for key, value in vars(module).items() if not isinstance(value, ModuleType)}
    tracker = sys.modules["megatron.core.tensor_parallel.random"].CudaRNGStatesTracker
    state |= {f"CudaRNGStatesTracker.{key}": value for key, value in vars(tracker).items()}
    for name, logger in logging.root.manager.loggerDict.items():
        if name.startswith("megatron") and isinstance(logger, logging.Logger):
            state[f"level of logger {name}"] = logger.level
    return state


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return the names whose values changed or disappeared, and new environment variables."""
    changed = [name for name, value in before.items() if name not in after or not _is_same(value, after[name])]
    return changed + [name for name in after.keys() - before.keys() if name.startswith("os.environ")]


def _is_same(before: Any, after: Any) -> bool:
    return before is after or (isinstance(before, (str, int, bool, list)) and before == after)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    for name in WATCHED:
        importlib.import_module(name)
    import megatron.core.transformer.transformer_layer  # noqa: F401, creates its logger before the snapshot

    before = snapshot()
    num_imported = 0
    for name in module_names():
        try:
            importlib.import_module(name)
            num_imported += 1
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] not in OPTIONAL_PACKAGES:
                raise
            print(f"skipped {name}: {error.name} is not installed")
    print(json.dumps({"num_imported": num_imported, "changes": differences(before, snapshot())}))


if __name__ == "__main__":
    main()
