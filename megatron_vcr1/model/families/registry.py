"""The supported families by the "model_type" in config.json. A new family is added here, and nowhere else."""

from __future__ import annotations

from megatron_vcr1.json_fields import Fields
from megatron_vcr1.model.families.base import Family
from megatron_vcr1.model.families.qwen2_5_vl.family import Qwen25VL
from megatron_vcr1.model.families.qwen2_vl import Qwen2VL
from megatron_vcr1.model.families.qwen3_vl.experts import Qwen3VLMoe
from megatron_vcr1.model.families.qwen3_vl.family import Qwen3VL

FAMILIES: dict[str, Family] = {family.model_type: family for family in (Qwen2VL(), Qwen25VL(), Qwen3VL(), Qwen3VLMoe())}


def read_family(raw: Fields) -> Family:
    """Return the family of a model by its config.json.

    Raises:
        UserError: model_type is missing or is not supported; the message names the supported ones.
    """
    name = raw.values.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    raise raw.error("model_type", f"must be {' or '.join(FAMILIES)}, the supported types")
