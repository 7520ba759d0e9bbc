"""Qwen3-VL with a mixture of experts (30B-A3B, 235B-A22B)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_vcr1.errors import UserError
from megatron_vcr1.json_fields import Fields
from megatron_vcr1.model.config import ExpertsConfig, ModelConfig
from megatron_vcr1.model.families.qwen3_vl.family import Qwen3VL
from megatron_vcr1.model.families.reading import language_model_fields

_MAX_EXPERTS = 1023
"""Largest number of groups of torch's grouped GEMM."""


@dataclass(frozen=True)
class Qwen3VLMoe(Qwen3VL):
    """Qwen3-VL with a mixture of experts. Everything but the language model's MLPs is as in the dense sizes."""

    model_type = "qwen3_vl_moe"
    title = "Qwen3-VL-MoE"

    def read_config(self, raw: Fields) -> ModelConfig:
        config = super().read_config(raw)
        experts = read_experts(language_model_fields(raw), config.text.num_layers)
        return replace(config, text=replace(config.text, experts=experts))


def read_experts(raw: Fields, num_layers: int) -> ExpertsConfig:
    """Read the experts.

    Args:
        raw: the language model's keys, from `language_model_fields`.
        num_layers: number of layers of the language model.

    Raises:
        UserError: a key is missing or has a value that is not supported; the message names the key.
    """
    if not raw.boolean("norm_topk_prob", True):
        raise raw.error("norm_topk_prob", "must be true, as in every published model of this family")
    for key in ("hidden_size", "moe_intermediate_size"):
        if raw.integer(key) % 8:
            raise raw.error(key, "must be a multiple of 8: rows of grouped GEMMs have a multiple of 16 bytes")
    num_experts, ffn_hidden_size = _num_experts(raw), raw.integer("moe_intermediate_size")
    if raw.integer("hidden_size") in (ffn_hidden_size, 2 * ffn_hidden_size):
        raise raw.error(
            "moe_intermediate_size",
            "must not be hidden_size or half of it: the shape of an expert's weight must tell whether it is transposed",
        )
    step = raw.integer("decoder_sparse_step", 1)
    dense = raw.integers("mlp_only_layers", ())
    layers = frozenset(index for index in range(step - 1, num_layers, step) if index not in dense)
    if not layers:
        raise UserError(
            f"{raw.where}: no layer has experts: decoder_sparse_step is {step}, mlp_only_layers is {list(dense)} and "
            f"num_hidden_layers is {num_layers}; correct them"
        )
    return ExpertsConfig(
        num_experts=num_experts,
        num_per_token=raw.integer("num_experts_per_tok", maximum=num_experts),
        ffn_hidden_size=ffn_hidden_size,
        layers=layers,
    )


def _num_experts(raw: Fields) -> int:
    """Return the number of experts, whose key transformers 5 writes as ``num_local_experts``."""
    keys = [key for key in ("num_experts", "num_local_experts") if key in raw] or ["num_experts"]
    first, *others = (raw.integer(key, maximum=_MAX_EXPERTS) for key in keys)
    if others and others[0] != first:
        raise UserError(f"{raw.where}: num_experts is {first}, but num_local_experts is {others[0]}; remove one")
    return first
