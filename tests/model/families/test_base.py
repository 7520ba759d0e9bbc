"""Only the modules of a family name it; the rest of the package uses the interface."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.families.registry import FAMILIES
from tests.model import tiny

PACKAGE = Path(__file__).parents[3] / "megatron_vcr1"
# The plug-in runs in SGLang, whose classes are one per family.
ALLOWED_FOLDERS = ("model/families/", "rollout/sglang/plugin/")
NAME = re.compile(r"qwen\d*(_\d+)?_?vl(?!_utils)", re.IGNORECASE)


@pytest.mark.parametrize("text", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "Qwen2_5_VLModel", "Qwen3VLConfig", "QwenVL"])
def test_the_pattern_finds_names_in_code(text: str) -> None:
    assert NAME.search(text)


def test_nothing_outside_of_the_families_names_one() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}:{number}: {match[0]}"
        for path in PACKAGE.rglob("*.py")
        if not path.relative_to(PACKAGE).as_posix().startswith(ALLOWED_FOLDERS)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (match := NAME.search(line))
    }
    assert not found, "use model.families.base.Family, or a fact in ModelConfig"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_configuration_knows_its_family(name: str) -> None:
    config = ModelConfig.from_dict(tiny.hf_config(name).to_dict())
    assert config.family == FAMILIES[name]


def test_the_error_for_another_model_names_the_supported_families() -> None:
    with pytest.raises(UserError, match=r"must be .*qwen2_5_vl.*, the supported types"):
        ModelConfig.from_dict({"model_type": "llama"})
