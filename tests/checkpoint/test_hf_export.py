from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_vcr1.checkpoint import hf_import, safetensors_io, torch_dist
from megatron_vcr1.checkpoint.hf_export import export_checkpoint
from megatron_vcr1.checkpoint.hf_import import import_checkpoint
from megatron_vcr1.checkpoint.torch_dist import read_chunk, read_metadata
from megatron_vcr1.checkpoint.verify import compare_weights
from megatron_vcr1.errors import UserError
from tests.checkpoint.hf_dirs import FAMILIES, contents, file_names, random_weights, small_config, write_hf_dir

KEY = "language_model.decoder.layers.0.mlp.linear_fc2.weight"  # [96, 128]
HF_NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_import_and_export_restore_every_file_byte_for_byte(
    tmp_path: Path, family: str, tied: bool, num_files: int
) -> None:
    config = small_config(family, tied=tied)
    hf_dir = write_hf_dir(tmp_path / "hf", config, random_weights(config), num_files=num_files)
    num_bytes = import_checkpoint(hf_dir, tmp_path / "imported")
    result = export_checkpoint(tmp_path / "imported", tmp_path / "exported")
    assert contents(tmp_path / "exported") == contents(hf_dir)
    assert result.num_bytes == num_bytes == sum(tensor.nbytes for tensor in random_weights(config).values())
    assert result.casts == {}
    assert file_names(tmp_path) == ["exported", "hf", "imported"]


@pytest.mark.parametrize("chunk_bytes", [1, 1000, 5000])
def test_exports_are_equal_for_any_number_of_chunks(
    hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(hf_import, "CHUNK_BYTES", chunk_bytes)
    import_checkpoint(hf_dir, tmp_path / "imported")
    chunks = read_metadata(tmp_path / "imported/megatron")[KEY].chunks
    assert len(chunks) == {1: 96, 1000: 32, 5000: 8}[chunk_bytes]  # of 96 rows of 256 bytes
    export_checkpoint(tmp_path / "imported", tmp_path / "exported")
    assert contents(tmp_path / "exported") == contents(hf_dir)


def test_mixed_dtypes_and_a_stored_tied_head_are_restored(tmp_path: Path) -> None:
    config = small_config(tied=True)
    weights = random_weights(config)
    weights = {name: tensor.float() if name.startswith("visual") else tensor for name, tensor in weights.items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    hf_dir = write_hf_dir(tmp_path / "hf", config, weights)
    import_checkpoint(hf_dir, tmp_path / "imported")
    export_checkpoint(tmp_path / "imported", tmp_path / "exported")
    assert contents(tmp_path / "exported") == contents(hf_dir)


def test_tensor_names_of_other_transformers_versions_are_restored(tmp_path: Path) -> None:
    config = small_config()
    renamed = {}
    for name, tensor in random_weights(config).items():
        new_prefix = "model.language_model." if name.startswith("model.") else "model."
        renamed[new_prefix + name.removeprefix("model.") if name != "lm_head.weight" else name] = tensor
    assert {"lm_head.weight", "model.language_model.norm.weight", "model.visual.merger.ln_q.weight"} < renamed.keys()
    hf_dir = write_hf_dir(tmp_path / "hf", config, renamed)
    import_checkpoint(hf_dir, tmp_path / "imported")
    export_checkpoint(tmp_path / "imported", tmp_path / "exported")
    assert contents(tmp_path / "exported") == contents(hf_dir)


def test_float32_checkpoints_are_exported_in_the_original_dtype(hf_dir: Path, imported_dir: Path) -> None:
    megatron_dir = imported_dir / "megatron"
    stored = read_metadata(megatron_dir)
    shutil.rmtree(megatron_dir)
    megatron_dir.mkdir()
    values = torch.linspace(-1, 1, 96 * 128).view(96, 128)
    halves = [values[:, :64].clone(), values[:, 64:].clone()]  # sharded by columns, as in row-parallel layers
    import_checkpoint(hf_dir, imported_dir / "again")
    others = [
        (chunk.key, chunk.offsets, read_chunk(imported_dir / "again/megatron", chunk))
        for tensor in read_metadata(imported_dir / "again/megatron").values()
        for chunk in tensor.chunks
        if chunk.key != KEY
    ]
    chunks = torch_dist.write_chunks(
        megatron_dir / "__0_0.distcp", [*others, (KEY, (0, 0), halves[0]), (KEY, (0, 64), halves[1])]
    )
    specs = {key: (tensor.dtype, tensor.shape) for key, tensor in stored.items()}
    torch_dist.write_metadata(megatron_dir, specs, chunks)
    result = export_checkpoint(imported_dir, imported_dir / "exported")
    assert result.casts == {"float32 to bfloat16": 2}

    exported = _load(imported_dir / "exported")
    assert torch.equal(exported.pop(HF_NAME), values.bfloat16())
    original = random_weights(small_config())
    assert all(torch.equal(tensor, original[name]) for name, tensor in exported.items())

    comparison = compare_weights(hf_dir, imported_dir)
    expected = (values.bfloat16().double() - original[HF_NAME].double()).abs().max().item()
    assert comparison.max_abs_differences == dict.fromkeys(original, 0.0) | {HF_NAME: expected}
    assert comparison.num_identical == comparison.num_tensors - 1


def _load(hf_dir: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in hf_dir.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_full_disk_leaves_no_output(imported_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors_io.os, "pwrite", disk_full)
    with pytest.raises(OSError, match="No space left on device"):
        export_checkpoint(imported_dir, tmp_path / "out")
    assert file_names(tmp_path) == ["hf", "imported"]


def test_a_damaged_checkpoint_leaves_no_output(imported_dir: Path, tmp_path: Path) -> None:
    chunks = imported_dir / "megatron/__0_0.distcp"
    chunks.write_bytes(chunks.read_bytes()[:200_000])
    with pytest.raises(UserError, match=r"__0_0\.distcp: .* cannot be read"):
        export_checkpoint(imported_dir, tmp_path / "out")
    assert file_names(tmp_path) == ["hf", "imported"]


def test_a_config_of_another_shape_is_refused(imported_dir: Path, tmp_path: Path) -> None:
    config = imported_dir / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    with pytest.raises(UserError, match="unexpected tensors"):
        export_checkpoint(imported_dir, tmp_path / "out")
    (imported_dir / "hf_layout.json").unlink()
    with pytest.raises(UserError, match=r"hf_layout\.json: not found"):
        export_checkpoint(imported_dir, tmp_path / "out")
