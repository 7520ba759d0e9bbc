"""The plug-in in SGLang's own environment."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

import megatron_vcr1

pytestmark = pytest.mark.xdist_group("sglang")

# Whatever is not a server's to have may not be imported.
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron", "pydantic_settings", "av", "vcr1_kernels"):
            raise ImportError(f"{name} was imported")
sys.meta_path.insert(0, Block())
"""
PLUGIN = "from megatron_vcr1.rollout.sglang.plugin.processor import check_sglang, ExactQwenVLProcessor\n"


@pytest.fixture
def run(sglang_python: Path, tmp_path: Path):
    (tmp_path / "megatron_vcr1").symlink_to(Path(megatron_vcr1.__file__).parent)

    def run(code: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "SGLANG_USE_CPU_ENGINE": "1"}
        return subprocess.run(
            [sglang_python, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
        )

    return run


def test_it_loads_without_the_trainers_packages(run) -> None:
    result = run(BLOCK + PLUGIN + "print(ExactQwenVLProcessor.models[1].__name__)")
    assert result.stdout.strip() == "Qwen2_5_VLForConditionalGeneration", result.stderr[-2000:]
    assert "is tested with sglang" not in result.stderr


def test_an_sglang_that_lacks_what_it_uses_ends_the_server(run) -> None:
    """The package's import must fail: an error in a module of it, SGLang would log and go on without the plug-in."""
    result = run(
        "import sglang; sglang.__version__ = '9.9'\n"
        "from sglang.srt.managers.schedule_batch import MultimodalDataItem\n"
        "del MultimodalDataItem.set_identity\n"
        "import importlib; importlib.import_module('megatron_vcr1.rollout.sglang.plugin')"
    )
    assert result.returncode != 0
    assert (
        "plug-in is tested with sglang 0.5.23, this is 9.9, which lacks MultimodalDataItem.set_identity"
        in result.stderr
    )


def test_an_untested_version_warns(run) -> None:
    result = run("import sglang; sglang.__version__ = '9.9'\n" + PLUGIN)
    assert result.returncode == 0
    assert "is tested with sglang 0.5.23, this is 9.9: compare its log-probs" in result.stderr
