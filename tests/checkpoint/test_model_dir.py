from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch

from megatron_vcr1.checkpoint.model_dir import (
    copy_model_files,
    is_imported,
    model_headers,
    read_headers,
    read_hf_layout,
)
from megatron_vcr1.errors import UserError
from tests.checkpoint.hf_dirs import contents, file_names, random_weights, small_config


def test_an_imported_model_keeps_the_headers_of_its_files(hf_dir: Path, imported_dir: Path) -> None:
    assert (is_imported(hf_dir), is_imported(imported_dir)) == (False, True)
    assert model_headers(imported_dir) == model_headers(hf_dir)


@pytest.mark.parametrize("hf_layout", [True, False])
def test_all_files_but_the_weights_are_copied(hf_dir: Path, tmp_path: Path, hf_layout: bool) -> None:
    (hf_dir / "checksums.json").write_text("{}")  # a checkpoint's own files are not copied
    for folder in ("additional_chat_templates", "checkpoint-500"):
        (hf_dir / folder).mkdir()
        (hf_dir / folder / "tools.jinja").write_text("{{ messages }}")
    (tmp_path / "copy").mkdir()
    copy_model_files(hf_dir, tmp_path / "copy", hf_layout=hf_layout)
    others = ["additional_chat_templates", "config.json", "model.safetensors.index.json"]
    others += ["preprocessor_config.json", "tokenizer.json"]
    assert file_names(tmp_path / "copy") == sorted([*others, "hf_layout.json"] if hf_layout else others)
    assert contents(tmp_path / "copy")["config.json"] == contents(hf_dir)["config.json"]
    templates = "additional_chat_templates"
    assert contents(tmp_path / "copy" / templates) == contents(hf_dir / templates) == {"tools.jinja": b"{{ messages }}"}


def test_an_index_that_contradicts_the_files_is_refused(hf_dir: Path) -> None:
    index = hf_dir / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"lm_head.weight": "model-00001', '"lm_head.weight": "model-00002'))
    with pytest.raises(UserError, match=r"places lm_head\.weight in model-00002.*, but it is in model-00001"):
        read_headers(hf_dir)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"weight_map": {"a": "../a.safetensors"}}',
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_index_is_named(hf_dir: Path, content: str) -> None:
    (hf_dir / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: "):
        read_headers(hf_dir)


def test_a_missing_file_is_named(hf_dir: Path) -> None:
    (hf_dir / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: cannot be opened"):
        read_headers(hf_dir)


def test_two_models_in_one_directory_are_refused(hf_dir: Path) -> None:
    safetensors.torch.save_file(random_weights(small_config()), hf_dir / "model.safetensors")
    with pytest.raises(UserError, match=r"holds two models: model\.safetensors, which transformers would read, and"):
        read_headers(hf_dir)
    index = hf_dir / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(random_weights(small_config()), "model.safetensors")}))
    read_headers(hf_dir)


def test_an_adapter_beside_the_model_is_not_left_out_silently(hf_dir: Path) -> None:
    (hf_dir / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct"}')
    with pytest.raises(UserError, match=r"holds a LoRA adapter \(adapter_config\.json\) beside the model"):
        read_headers(hf_dir)


def test_a_directory_without_safetensors_is_refused(hf_dir: Path, imported_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="its weights are a Megatron checkpoint, not safetensors"):
        read_headers(imported_dir)
    with pytest.raises(UserError, match=r"has neither model\.safetensors\.index\.json nor model\.safetensors;"):
        read_headers(tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        read_headers(tmp_path / "none")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(UserError, match=r"pytorch_model\.bin cannot be read: save the model again"):
        read_headers(tmp_path)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(UserError, match="it holds a LoRA adapter: merge it into its base model"):
        read_headers(tmp_path)


def test_a_damaged_hf_layout_is_named(imported_dir: Path) -> None:
    path = imported_dir / "hf_layout.json"
    text = path.read_text()
    path.write_text(text.replace("model-00001", "../model-00001"))  # must not lead out of the directory
    with pytest.raises(UserError, match=r"hf_layout\.json: damaged"):
        read_hf_layout(imported_dir)
    path.write_text(text.replace('"version": 1', '"version": 9'))
    with pytest.raises(UserError, match="has version 9, but only version 1 can be read"):
        read_hf_layout(imported_dir)
    path.unlink()
    with pytest.raises(UserError, match=r"hf_layout\.json: not found; give the path of an imported model"):
        read_hf_layout(imported_dir)
