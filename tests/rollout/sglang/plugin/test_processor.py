"""Tests of the plug-in in SGLang's own environment."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import megatron_vcr1
from tests.limits import HANG_S

pytestmark = pytest.mark.xdist_group("sglang")

# Importing SGLang takes long, so one process does everything. Imports that a server may not need fail in it.
SCRIPT = """
import importlib, json, sys, warnings

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "pydantic_settings", "av", "vcr1_kernels"):
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, Block())
package = "megatron_vcr1.rollout.sglang.plugin"
found = {}

def import_package():
    sys.modules.pop(package, None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        importlib.import_module(package)
    return [str(warning.message) for warning in caught if "is tested with sglang" in str(warning.message)]

found["unchanged"] = import_package()
found["model"] = sys.modules[f"{package}.processor"].ExactQwenVLProcessor.models[1].__name__
import sglang
from sglang.srt.managers.schedule_batch import MultimodalDataItem
sglang.__version__ = "9.9"
found["another version"] = import_package()
del MultimodalDataItem.set_identity
try:
    import_package()
except RuntimeError as error:
    found["incomplete"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(sglang_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "megatron_vcr1").symlink_to(Path(megatron_vcr1.__file__).parent)
    environment = os.environ | {"PYTHONPATH": str(folder), "SGLANG_USE_CPU_ENGINE": "1"}
    result = subprocess.run(
        [sglang_python, "-c", SCRIPT], env=environment, cwd=folder, capture_output=True, text=True, timeout=HANG_S
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_the_plugin_loads_without_the_trainers_packages(found: dict[str, object]) -> None:
    assert found["model"] == "Qwen2_5_VLForConditionalGeneration"
    assert found["unchanged"] == []


def test_an_sglang_that_lacks_a_method_ends_the_server(found: dict[str, object]) -> None:
    """The import of the package must fail: SGLang only logs an error of a module, and runs without the plug-in."""
    expected = "plug-in is tested with sglang 0.5.23, this is 9.9, which lacks MultimodalDataItem.set_identity"
    assert expected in str(found["incomplete"])


def test_an_untested_version_warns(found: dict[str, object]) -> None:
    assert "is tested with sglang 0.5.23, this is 9.9: compare its log-probs" in str(found["another version"])
