"""Reading of the keys in config.json that families share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from megatron_vcr1.errors import UserError
from megatron_vcr1.json_fields import Fields
from megatron_vcr1.model.config import VISION_ROTARY_BASE, TextConfig, Yarn

MAX_LAYERS = 4096
IMAGE_PAD_ID, VIDEO_PAD_ID = 151655, 151656
"""Ids of the pads in all published models."""


def language_model_fields(raw: Fields) -> Fields:
    """Return the keys of the language model.

    The published files of older models have them at the top level; transformers 5 writes a nested ``text_config``,
    whose values take precedence.

    Raises:
        UserError: two sections describe different rotary positions.
    """
    nested = raw.section("text_config")
    _check_same_rope([part.section(key) for part in (raw, nested) for key in ("rope_parameters", "rope_scaling")])
    is_nested = "hidden_size" in nested or "num_hidden_layers" in nested
    present = {key: value for key, value in nested.values.items() if value is not None}
    return Fields({**raw.values, **present}, nested.where if is_nested else raw.where)


def rope_fields(raw: Fields) -> Fields:
    """Return the section of the rotary positions; transformers 4 calls it ``rope_scaling``.

    Raises:
        UserError: the positions are of a type that no published model of these families has, or of two types.
    """
    rope = raw.section("rope_parameters" if raw.values.get("rope_parameters") else "rope_scaling")
    types = {key: rope.text(key) for key in ("rope_type", "type") if key in rope}
    for key, kind in types.items():
        if kind not in ("default", "mrope", "yarn"):
            raise rope.error(key, "is not supported; only 'mrope', the published models' rope type, and 'yarn' are")
    if len(types) == 2 and list(types.values()).count("yarn") == 1:
        raise UserError(
            f"{rope.where}: rope_type is {types['rope_type']!r}, but type, its old name, is {types['type']!r}; keep "
            "rope_type with the right value, and remove type"
        )
    return rope


def _check_same_rope(sections: Sequence[Fields]) -> None:
    """Refuse sections of the rotary positions that differ: other programs may not use the one that is used here."""
    used = [section for section in sections if section.values]
    for section in used[1:]:
        if _rope_meaning(section) != _rope_meaning(used[0]):
            raise UserError(f"{used[0].where} and {section.where} describe different rotary positions; remove one")


def _rope_meaning(rope: Fields) -> tuple[Any, ...]:
    keys = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow") if _is_yarn(rope) else ()
    return _is_yarn(rope), *(rope.values.get(key) for key in (*keys, "mrope_section"))


def _is_yarn(rope: Fields) -> bool:
    return (rope.text("rope_type", None) or rope.text("type", None)) == "yarn"


def rope_base(raw: Fields, default: float | None = None) -> float:
    """Return rope_theta, the base of the rotary frequencies.

    transformers 4 wrote it beside the section of the rotary positions, transformers 5 writes it into the section.

    Args:
        raw: the language model's keys.
        default: the value if the file has none; None: it must have one.

    Raises:
        UserError: it is missing, is not a number, or has two values.
    """
    rope = rope_fields(raw)
    inside, beside = (fields.number("rope_theta", None) for fields in (rope, raw))
    if inside is not None and beside is not None and inside != beside:
        raise UserError(
            f"{rope.where}: rope_theta is {inside:g}, but {raw.where}: rope_theta is {beside:g}; remove the wrong one"
        )
    found = beside if inside is None else inside
    if found is None:
        found = raw.number("rope_theta") if default is None else default
    return float(found)


def _yarn(rope: Fields) -> Yarn | None:
    """Return YaRN's parameters, with transformers' defaults; None if the positions are not of this type.

    Raises:
        UserError: a key is missing or has a value that is not supported.
    """
    if not _is_yarn(rope):
        return None
    # SGLang and transformers do not read the same ones of these keys.
    for key in ("attention_factor", "attn_factor", "extrapolation_factor", "mscale", "mscale_all_dim"):
        if key in rope:
            raise rope.error(key, "is not supported with 'yarn'; leave it out")
    if "truncate" in rope and not rope.boolean("truncate"):
        raise rope.error("truncate", "is not supported with 'yarn'; leave it out")
    return Yarn(
        factor=float(rope.number("factor")),
        original_max_positions=rope.integer("original_max_position_embeddings"),
        beta_fast=float(rope.number("beta_fast", 32)),
        beta_slow=float(rope.number("beta_slow", 1)),
    )


def _max_positions(raw: Fields, yarn: Yarn | None) -> int | None:
    """Return the range of positions that the model can be used with."""
    trained = raw.integer("max_position_embeddings", None)
    if yarn is None:
        return trained
    return max(trained or 0, math.floor(yarn.factor * yarn.original_max_positions))


def embeddings_are_tied(raw: Fields) -> bool:
    """Return whether the head's weight is the embedding in Qwen2-VL and Qwen2.5-VL.

    transformers 4.52 to 4.57 wrote the key, which concerns the whole model, to ``text_config`` only.
    """
    return any([part.boolean("tie_word_embeddings") for part in (raw, raw.section("text_config"))])


def check_vision_keys(raw: Fields, *, hidden_act: str) -> None:
    """Refuse values of ``vision_config`` that are the same in all published models of a family.

    Args:
        raw: its keys.
        hidden_act: the family's activation.

    Raises:
        UserError: a key has another value.
    """
    for key, supported in (("in_channels", 3), ("in_chans", 3), ("hidden_act", hidden_act)):
        if key in raw and raw.values[key] != supported:
            raise raw.error(key, f"must be {supported!r}; no other value is supported")
    rope = raw.section("rope_parameters")
    if rope.number("rope_theta", VISION_ROTARY_BASE) != VISION_ROTARY_BASE:
        raise rope.error("rope_theta", f"must be {VISION_ROTARY_BASE:g}; no other value is supported")


def pad_id(raw: Fields, key: str, default: int, vocab_size: int) -> int:
    """Return the id of a pad. The default, which is that of the published models, may lie beyond the vocabulary of a
    small model that has no pads.
    """
    token_id = raw.integer(key, default, minimum=0)
    if key in raw and token_id >= vocab_size:
        raise raw.error(key, f"must be below vocab_size, which is {vocab_size}: the embedding has no row for it")
    return token_id


def read_text_config(
    raw: Fields,
    *,
    head_dim: int | None,
    rope_theta: float,
    mrope_axes: Callable[[tuple[int, ...]], tuple[int, ...]],
    qkv_bias: bool,
    qk_norm: bool,
    tied_embeddings: bool,
) -> TextConfig:
    """Read the language model.

    Args:
        raw: its keys, from `language_model_fields`.
        head_dim: size of a head; None for hidden size / heads.
        rope_theta: base of the rotary frequencies.
        mrope_axes: maps mrope_section, the numbers of frequencies of time, height and width, to TextConfig.mrope_axes;
            raises ValueError if it cannot.
        qkv_bias, qk_norm, tied_embeddings: as in TextConfig.

    Raises:
        UserError: a key is missing or has a value that is not supported; the message names the key.
    """
    if "hidden_act" in raw and raw.values["hidden_act"] != "silu":
        raise raw.error("hidden_act", "must be 'silu'; no other value is supported")
    num_layers = raw.integer("num_hidden_layers", maximum=MAX_LAYERS)
    _check_layer_types(raw, num_layers)
    hidden_size, num_heads = raw.integer("hidden_size"), raw.integer("num_attention_heads")
    if head_dim is None:
        if hidden_size % num_heads:
            raise UserError(f"{raw.where}: hidden size {hidden_size} is not a multiple of {num_heads} heads")
        head_dim = hidden_size // num_heads
    rope = rope_fields(raw)
    section, yarn = rope.integers("mrope_section", length=3), _yarn(rope)
    if 2 * sum(section) != head_dim:
        raise UserError(
            f"{raw.where}: mrope_section {list(section)} must sum to half the head dimension, {head_dim // 2}"
        )
    try:
        axes = mrope_axes(section)
    except ValueError as error:
        raise UserError(f"{raw.where}: {error}") from None
    return TextConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=raw.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=raw.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        vocab_size=raw.integer("vocab_size"),
        norm_epsilon=raw.number("rms_norm_eps", 1e-6, below=1),
        rope_theta=rope_theta,
        mrope_axes=axes,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        tied_embeddings=tied_embeddings,
        max_positions=_max_positions(raw, yarn),
        yarn=yarn,
    )


def _check_layer_types(raw: Fields, num_layers: int) -> None:
    """Check the list of attention types that transformers 5 writes, one per layer; all of them must be full."""
    if "layer_types" not in raw:
        return
    types = raw.values["layer_types"]
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise raw.error("layer_types", "must be a list of strings, one per layer")
    if len(types) != num_layers:
        raise UserError(
            f"{raw.where}: layer_types has {len(types)} entries, but num_hidden_layers is {num_layers}; correct one of "
            "them, or remove layer_types"
        )
    if other := sorted(set(types) - {"full_attention"}):
        raise UserError(f"{raw.where}: layer_types contains {other[0]!r}; only 'full_attention' is supported")
