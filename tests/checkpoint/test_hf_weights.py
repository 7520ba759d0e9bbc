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


def test_any_rows_of_any_tensor(hf_dir: Path) -> None:
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


def test_a_mis_shaped_tensor_is_named_with_both_shapes(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights[GATE] = weights[GATE].T.contiguous()
    write_hf_dir(tmp_path / "hf", CONFIG, weights)
    with pytest.raises(UserError, match=rf"{GATE} in .* has shape \(96, 128\); config.json asks for \(128, 96\)"):
        HfWeights(tmp_path / "hf", LAYOUTS)


def test_different_dtypes_within_one_megatron_tensor_are_refused(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights[GATE] = weights[GATE].float()
    write_hf_dir(tmp_path / "hf", CONFIG, weights)
    with pytest.raises(UserError, match=rf"different dtypes: {GATE} torch\.float32, .*up_proj\.weight torch\.bfloat16"):
        HfWeights(tmp_path / "hf", LAYOUTS)


def test_different_dtypes_of_different_tensors_are_fine(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    write_hf_dir(tmp_path / "hf", CONFIG, weights)
    with HfWeights(tmp_path / "hf", LAYOUTS) as opened:
        assert opened.dtype(LAYOUTS["language_model.decoder.final_layernorm.weight"]) == torch.float32


def test_an_index_that_contradicts_the_files_is_refused(hf_dir: Path) -> None:
    index = hf_dir / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"lm_head.weight": "model-00001', '"lm_head.weight": "model-00002'))
    with pytest.raises(UserError, match=r"places lm_head\.weight in model-00002.*, but it is in model-00001"):
        HfWeights(hf_dir, LAYOUTS)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": {"a": "../a.safetensors"}}'])
def test_a_damaged_index_is_named(hf_dir: Path, content: str) -> None:
    (hf_dir / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index\.json: not a safetensors index"):
        HfWeights(hf_dir, LAYOUTS)


def test_a_missing_shard_is_named(hf_dir: Path) -> None:
    (hf_dir / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: cannot be opened"):
        HfWeights(hf_dir, LAYOUTS)


@pytest.mark.parametrize("again", [GATE, GATE.replace("model.", "model.language_model.")])
def test_a_tensor_that_is_there_twice_is_refused(hf_dir: Path, again: str) -> None:
    index = json.loads((hf_dir / "model.safetensors.index.json").read_text())
    others = {file: safetensors.torch.load_file(hf_dir / file) for file in set(index["weight_map"].values())}
    other = max(file for file in others if again not in others[file])
    others[other][again] = torch.zeros(128, 96, dtype=torch.bfloat16)
    safetensors.torch.save_file(others[other], hf_dir / other)
    index["weight_map"][again] = max(file for file in others if again in others[file])  # an index names one place
    (hf_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"{GATE} is there twice, in model-00001.* and in model-00002"):
        HfWeights(hf_dir, LAYOUTS)


def test_two_models_in_one_directory_are_refused(hf_dir: Path) -> None:
    safetensors.torch.save_file(random_weights(CONFIG), hf_dir / "model.safetensors")
    with pytest.raises(UserError, match=r"holds two models: model\.safetensors, which transformers would read, and"):
        HfWeights(hf_dir, LAYOUTS)
    index = hf_dir / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(random_weights(CONFIG), "model.safetensors")}))
    HfWeights(hf_dir, LAYOUTS).close()


def test_a_directory_without_safetensors_is_refused(hf_dir: Path, imported_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its weights are a Megatron checkpoint, not safetensors"):
        HfWeights(imported_dir, LAYOUTS)
    with pytest.raises(UserError, match=r"neither model\.safetensors\.index\.json nor model\.safetensors;"):
        HfWeights(tmp_path, LAYOUTS)
    with pytest.raises(UserError, match="no such directory"):
        HfWeights(tmp_path / "none", LAYOUTS)


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path: Path) -> None:
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
