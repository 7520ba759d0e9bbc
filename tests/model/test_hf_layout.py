"""The layout against transformers' own models of every published size, and against formulas written another way."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import TensorLayout, hf_shapes, model_layout, published_name, to_hf, to_megatron


def _text(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, *, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    }


def _vision_2_5(ffn: int, out: int) -> dict[str, Any]:
    return {"hidden_size": 1280, "intermediate_size": ffn, "out_hidden_size": out}


def _text_3(hidden: int, ffn: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    rope = {"mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_type": "default"}
    text = _text(hidden, ffn, layers, heads, 8, 151936, tied=tied)
    return text | {"head_dim": 128, "rope_theta": 5e6, "rope_scaling": rope}


def _vision_3(depth: int, hidden: int, ffn: int, out: int, deepstack: list[int]) -> dict[str, Any]:
    sizes = {"depth": depth, "hidden_size": hidden, "intermediate_size": ffn, "num_heads": 16, "out_hidden_size": out}
    return sizes | {"num_position_embeddings": 2304, "deepstack_visual_indexes": deepstack}


def _experts(ffn: int) -> dict[str, Any]:
    sizes = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": ffn}
    return sizes | {"num_key_value_heads": 4, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}


# Sizes in the published config.json files, and the number of parameters that the model pages show.
PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    "Qwen2.5-VL-3B": (
        "qwen2_5_vl",
        _text(2048, 11008, 36, 16, 2, 151936, tied=True),
        _vision_2_5(3420, 2048),
        3_754_622_976,
    ),
    "Qwen2.5-VL-7B": (
        "qwen2_5_vl",
        _text(3584, 18944, 28, 28, 4, 152064, tied=False),
        _vision_2_5(3420, 3584),
        8_292_166_656,
    ),
    "Qwen2.5-VL-32B": (
        "qwen2_5_vl",
        _text(5120, 27648, 64, 40, 8, 152064, tied=False),
        _vision_2_5(3456, 5120),
        33_452_718_336,
    ),
    "Qwen2.5-VL-72B": (
        "qwen2_5_vl",
        _text(8192, 29568, 80, 64, 8, 152064, tied=False),
        _vision_2_5(3456, 8192),
        73_410_777_344,
    ),
    "Qwen2-VL-2B": (
        "qwen2_vl",
        _text(1536, 8960, 28, 12, 2, 151936, tied=True),
        {"hidden_size": 1536},
        2_208_985_600,
    ),
    "Qwen2-VL-7B": (
        "qwen2_vl",
        _text(3584, 18944, 28, 28, 4, 152064, tied=False),
        {"hidden_size": 3584},
        8_291_375_616,
    ),
    "Qwen3-VL-2B": (
        "qwen3_vl",
        _text_3(2048, 6144, 28, 16, tied=True),
        _vision_3(24, 1024, 4096, 2048, [5, 11, 17]),
        2_127_532_032,
    ),
    "Qwen3-VL-4B": (
        "qwen3_vl",
        _text_3(2560, 9728, 36, 32, tied=True),
        _vision_3(24, 1024, 4096, 2560, [5, 11, 17]),
        4_437_815_808,
    ),
    "Qwen3-VL-8B": (
        "qwen3_vl",
        _text_3(4096, 12288, 36, 32, tied=False),
        _vision_3(27, 1152, 4304, 4096, [8, 16, 24]),
        8_767_123_696,
    ),
    "Qwen3-VL-32B": (
        "qwen3_vl",
        _text_3(5120, 25600, 64, 64, tied=False),
        _vision_3(27, 1152, 4304, 5120, [8, 16, 24]),
        33_357_390_064,
    ),
    "Qwen3-VL-30B-A3B": (
        "qwen3_vl_moe",
        _text_3(2048, 6144, 48, 32, tied=False) | _experts(768),
        _vision_3(27, 1152, 4304, 2048, [8, 16, 24]),
        31_070_754_032,
    ),
    "Qwen3-VL-235B-A22B": (
        "qwen3_vl_moe",
        _text_3(4096, 12288, 94, 64, tied=False) | _experts(1536),
        _vision_3(27, 1152, 4304, 4096, [8, 16, 24]),
        235_670_022_896,
    ),
    "Qwen2-VL-72B": (
        "qwen2_vl",
        _text(8192, 29568, 80, 64, 8, 152064, tied=False),
        {"hidden_size": 8192},
        73_405_560_320,
    ),
}
TRANSFORMERS = {
    "qwen2_5_vl": (transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration),
    "qwen2_vl": (transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration),
    "qwen3_vl": (transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration),
    "qwen3_vl_moe": (transformers.Qwen3VLMoeConfig, transformers.Qwen3VLMoeForConditionalGeneration),
}
SMALL_TEXT = _text(96, 40, 1, 6, 2, 50, tied=False) | {"rope_scaling": {"mrope_section": [2, 3, 3]}}


def _layouts(family: str, text: dict[str, Any], vision: dict[str, Any]) -> dict[str, TensorLayout]:
    return model_layout(ModelConfig.from_dict({"model_type": family, "vision_config": vision, **text}))


def _small_layouts(family: str = "qwen2_5_vl") -> dict[str, TensorLayout]:
    size = {"hidden_size": 24, "intermediate_size": 20, "out_hidden_size": 96}
    if family == "qwen2_vl":
        size = {"embed_dim": 24, "mlp_ratio": 2, "hidden_size": 96}
    if family.startswith("qwen3_vl"):
        size |= {"num_position_embeddings": 9, "deepstack_visual_indexes": [0]}
    text = SMALL_TEXT
    if family.startswith("qwen3_vl"):
        rope = {"mrope_section": [2, 2, 1]}
        text = text | {"num_hidden_layers": 2, "head_dim": 10, "rope_theta": 1e4, "rope_scaling": rope}
    if family == "qwen3_vl_moe":
        text = text | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return _layouts(family, text, {"depth": 1, "num_heads": 3, "spatial_merge_size": 2, **size})


def _numbered(layout: TensorLayout) -> dict[str, torch.Tensor]:
    """Return Hugging Face tensors in which all numbers differ."""
    tensors, start = {}, 0
    for name, shape in layout.hf_shapes.items():
        tensors[name] = torch.arange(start, start + math.prod(shape)).reshape(shape)
        start += math.prod(shape)
    return tensors


@pytest.mark.parametrize("size", PUBLISHED)
def test_layouts_cover_exactly_the_tensors_of_transformers(size: str) -> None:
    family, text, vision, num_parameters = PUBLISHED[size]
    config_class, model_class = TRANSFORMERS[family]
    if family.startswith("qwen3_vl"):
        config = config_class(text_config=text, vision_config=vision, tie_word_embeddings=text["tie_word_embeddings"])
    else:
        config = config_class(**text, vision_config=vision)
    with torch.device("meta"):
        model = model_class(config)
    layouts = _layouts(family, text, vision)
    shapes = hf_shapes(layouts)
    expected = {published_name(name, shapes): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if text["tie_word_embeddings"]:
        del expected["lm_head.weight"]  # the same tensor as the embedding, and not in the published files
    assert shapes.keys() == expected.keys()
    for layout in layouts.values():  # transformers 5 has experts in memory as Megatron has them
        assert all(layout.shapes_in_files(name)[-1] == expected[name] for name in layout.hf_shapes)
    assert sum(math.prod(shape) for shape in expected.values()) == num_parameters
    padding = 0
    if size in ("Qwen2.5-VL-3B", "Qwen2.5-VL-7B"):
        padding = 32 * 164 * (3 * 1280 + 2)  # 3420 becomes 3584
    elif size.startswith("Qwen3-VL") and vision["depth"] == 27:
        padding = 27 * 304 * (2 * 1152 + 1)  # 4304 becomes 4608
    assert sum(math.prod(layout.shape) for layout in layouts.values()) == num_parameters + padding


def test_the_published_index_of_qwen2_5_vl_7b(realdata: Path) -> None:
    folder = realdata / "qwen/Qwen2.5-VL-7B-Instruct"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shapes = hf_shapes(model_layout(ModelConfig.from_pretrained(folder)))
    assert len(index["weight_map"]) == 729
    assert shapes.keys() == index["weight_map"].keys()
    assert 2 * sum(math.prod(shape) for shape in shapes.values()) == index["metadata"]["total_size"]


def test_the_published_index_of_qwen2_vl_7b(realdata: Path) -> None:
    index = json.loads((realdata / "qwen/Qwen2-VL-7B-Instruct/model.safetensors.index.json").read_text())
    family, text, vision, _ = PUBLISHED["Qwen2-VL-7B"]
    shapes = hf_shapes(_layouts(family, text, vision))
    assert shapes.keys() == index["weight_map"].keys()
    assert 2 * sum(math.prod(shape) for shape in shapes.values()) == index["metadata"]["total_size"]


@pytest.mark.parametrize("size", PUBLISHED)
def test_blocks_cover_every_row_of_both_formats_once(size: str) -> None:
    family, text, vision, _ = PUBLISHED[size]
    for layout in _layouts(family, text, vision).values():
        used: Counter[str] = Counter()
        row = 0
        # Rows of padding follow each block of a padded tensor.
        padding = (layout.shape[0] - sum(block.num_rows for block in layout.blocks)) // len(layout.blocks)
        assert padding == 0 or (layout.is_padded and "vision_tower" in layout.key)
        for block in layout.blocks:
            assert block.row == row
            row += block.num_rows + padding
            used[block.hf_name] += block.num_rows
        assert row == layout.shape[0]
        assert used == {name: shape[0] for name, shape in layout.hf_shapes.items()}
        assert len({(block.hf_name, block.hf_row) for block in layout.blocks}) == len(layout.blocks)


def test_language_qkv_is_grouped_by_key_value_head() -> None:
    layout = _small_layouts()["language_model.decoder.layers.0.self_attention.linear_qkv.weight"]
    hf = _numbered(layout)
    query, key, value = (hf[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkv")
    grouped = torch.cat(
        (query.view(2, 3 * 16, 96), key.view(2, 16, 96), value.view(2, 16, 96)), dim=1
    )  # [key-value heads, rows of the group, hidden]
    assert torch.equal(to_megatron(layout, hf), grouped.flatten(0, 1))


def test_vision_qkv_is_grouped_by_head() -> None:
    layout = _small_layouts()["vision_tower.decoder.layers.0.self_attention.linear_qkv.bias"]
    hf = _numbered(layout)
    bias = hf["visual.blocks.0.attn.qkv.bias"].view(3, 3, 8)  # [q k v, heads, head_dim]
    assert torch.equal(to_megatron(layout, hf), bias.transpose(0, 1).flatten())


def test_gated_mlp_stacks_gate_on_up() -> None:
    layout = _small_layouts()["language_model.decoder.layers.0.mlp.linear_fc1.weight"]
    hf = _numbered(layout)
    gate, up = (hf[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(to_megatron(layout, hf), torch.cat((gate, up)))


def test_experts_are_transposed_unless_a_file_has_them_as_megatron_does() -> None:
    layout = _small_layouts("qwen3_vl_moe")["language_model.decoder.layers.0.mlp.experts.linear_fc1.weight"]
    hf = _numbered(layout)
    (name,) = hf
    assert (layout.shape, hf[name].shape) == ((3, 32, 96), (3, 96, 32))
    assert torch.equal(to_megatron(layout, hf), hf[name].transpose(1, 2))
    assert torch.equal(to_megatron(layout, {name: hf[name].transpose(1, 2)}), hf[name].transpose(1, 2))


def test_patch_embedding_is_the_flattened_convolution() -> None:
    layout = _small_layouts()["vision_tower.patch_embed.weight"]
    hf = _numbered(layout)
    assert hf["visual.patch_embed.proj.weight"].shape == (24, 3, 2, 14, 14)
    assert torch.equal(to_megatron(layout, hf), hf["visual.patch_embed.proj.weight"].flatten(1))


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_to_hf_inverts_to_megatron(family: str) -> None:
    for layout in _small_layouts(family).values():
        hf = _numbered(layout)
        tensor = to_megatron(layout, hf)
        assert tensor.shape == layout.shape
        back = to_hf(layout, tensor)
        assert back.keys() == hf.keys()
        assert all(torch.equal(back[name], hf[name]) for name in hf)


def test_to_hf_drops_the_padding_of_the_vocabulary() -> None:
    layout = _small_layouts()["language_model.output_layer.weight"]
    padded = torch.cat((torch.arange(50 * 96).view(50, 96), torch.full((14, 96), -1)))
    assert torch.equal(to_hf(layout, padded)["lm_head.weight"], padded[:50])


@given(st.data())
def test_blocks_in_returns_the_blocks_of_a_range_of_rows(data: st.DataObject) -> None:
    layouts = _small_layouts()
    layout = layouts[data.draw(st.sampled_from(sorted(layouts)))]
    start = data.draw(st.integers(0, layout.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, layout.shape[0]))
    hf = _numbered(layout)
    rows = [
        hf[block.hf_name].reshape(-1, layout.num_columns)[block.hf_row : block.hf_row + block.num_rows]
        for block in layout.blocks_in(start, stop)
    ]
    expected = to_megatron(layout, hf).reshape(-1, layout.num_columns)[start:stop]
    assert torch.equal(torch.cat(rows), expected)
    assert [block.row for block in layout.blocks_in(start, stop)] == [
        sum(len(part) for part in rows[:index]) for index in range(len(rows))
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.visual.blocks.0.norm1.weight", "visual.blocks.0.norm1.weight"),
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("visual.merger.ln_q.weight", "visual.merger.ln_q.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_flat_published_names(name: str, expected: str) -> None:
    assert published_name(name, {expected}) == expected


@pytest.mark.parametrize("name", ["model.visual.merger.norm.weight", "model.language_model.norm.weight"])
def test_nested_published_names(name: str) -> None:
    assert published_name(name, {name}) == name
    assert published_name(name.replace("model.visual", "visual").replace("language_model.", ""), {name}) == name


def test_a_name_of_another_model_is_unchanged() -> None:
    assert published_name("model.audio.weight", {"audio.weight"}) == "model.audio.weight"
