from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from megatron_vcr1.checkpoint.hf_weights import HfWeights
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import model_layout, to_megatron
from tests.checkpoint.hf_dirs import random_weights, small_config, write_hf_dir

CONFIG = small_config()
LAYOUTS = model_layout(ModelConfig.from_dict(CONFIG))
TIED_CONFIG = small_config(tied=True)
TIED_LAYOUTS = model_layout(ModelConfig.from_dict(TIED_CONFIG))
GATE = "model.layers.1.mlp.gate_proj.weight"


def test_rows_of_every_tensor_are_read(hf_dir: Path) -> None:
    expected = random_weights(CONFIG)
    with HfWeights(hf_dir, LAYOUTS) as weights:
        for layout in LAYOUTS.values():
            start, stop = layout.shape[0] // 3, layout.shape[0] // 3 * 2
            rows = torch.empty(stop - start, layout.num_columns, dtype=weights.dtype(layout))
            weights.read_rows(layout, start, rows)
            whole = to_megatron(layout, expected).reshape(-1, layout.num_columns)
            assert torch.equal(rows, whole[start:stop]), layout.key


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    del weights[GATE]
    write_hf_dir(tmp_path / "hf", CONFIG, weights)
    with pytest.raises(UserError, match=f"missing tensors: {GATE};"):
        HfWeights(tmp_path / "hf", LAYOUTS)


def test_unexpected_tensors_are_named_with_their_file(tmp_path: Path) -> None:
    weights = random_weights(CONFIG) | {"visual.blocks.7.norm1.weight": torch.ones(48)}
    write_hf_dir(tmp_path / "hf", CONFIG, weights, num_files=1)
    with pytest.raises(UserError, match=r"unexpected tensors: visual\.blocks\.7\.norm1\.weight \(model\.safetensors\)"):
        HfWeights(tmp_path / "hf", LAYOUTS)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights[GATE] = weights[GATE].T.contiguous()
    write_hf_dir(tmp_path / "hf", CONFIG, weights)
    with pytest.raises(UserError, match=rf"{GATE} in .* has shape \(96, 128\), but config.json implies \(128, 96\)"):
        HfWeights(tmp_path / "hf", LAYOUTS)


def test_mixed_dtypes_within_one_megatron_tensor_are_refused(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights[GATE] = weights[GATE].float()
    write_hf_dir(tmp_path / "hf", CONFIG, weights)
    with pytest.raises(UserError, match=rf"different dtypes: {GATE} torch\.float32, .*up_proj\.weight torch\.bfloat16"):
        HfWeights(tmp_path / "hf", LAYOUTS)


def test_different_megatron_tensors_may_have_different_dtypes(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    write_hf_dir(tmp_path / "hf", CONFIG, weights)
    with HfWeights(tmp_path / "hf", LAYOUTS) as opened:
        assert opened.dtype(LAYOUTS["language_model.decoder.final_layernorm.weight"]) == torch.float32


@pytest.mark.parametrize("again", [GATE, GATE.replace("model.", "model.language_model.")])
def test_a_duplicated_tensor_is_refused(hf_dir: Path, again: str) -> None:
    index = json.loads((hf_dir / "model.safetensors.index.json").read_text())
    others = {file: safetensors.torch.load_file(hf_dir / file) for file in set(index["weight_map"].values())}
    other = max(file for file in others if again not in others[file])
    others[other][again] = torch.zeros(128, 96, dtype=torch.bfloat16)
    safetensors.torch.save_file(others[other], hf_dir / other)
    index["weight_map"][again] = max(file for file in others if again in others[file])  # an index names one place
    (hf_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"{GATE} exists twice, in model-00001.* and in model-00002"):
        HfWeights(hf_dir, LAYOUTS)


def test_a_tied_head_may_be_stored_if_it_equals_the_embedding(tmp_path: Path) -> None:
    weights = random_weights(TIED_CONFIG)
    embedding = LAYOUTS["language_model.embedding.word_embeddings.weight"]
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    write_hf_dir(tmp_path / "same", TIED_CONFIG, weights)
    rows = torch.empty(160, 96, dtype=torch.bfloat16)
    with HfWeights(tmp_path / "same", TIED_LAYOUTS) as opened:
        opened.read_rows(embedding, 0, rows)
    assert torch.equal(rows, weights["model.embed_tokens.weight"])

    weights["lm_head.weight"][7, 7] += 1
    write_hf_dir(tmp_path / "other", TIED_CONFIG, weights)
    with (
        HfWeights(tmp_path / "other", TIED_LAYOUTS) as opened,
        pytest.raises(UserError, match=r"lm_head\.weight and model\.embed_tokens\.weight differ, but"),
    ):
        opened.read_rows(embedding, 0, rows)
