from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_vcr1.checkpoint import hf_import, safetensors_io, torch_dist
from megatron_vcr1.checkpoint.hf_export import export_checkpoint
from megatron_vcr1.checkpoint.hf_import import import_checkpoint
from megatron_vcr1.checkpoint.new_directory import new_directory
from megatron_vcr1.checkpoint.torch_dist import read_chunk, read_metadata
from megatron_vcr1.checkpoint.verify import compare_weights
from megatron_vcr1.errors import UserError
from tests.checkpoint.hf_dirs import FAMILIES, contents, random_weights, small_config, write_hf_dir

KEY = "language_model.decoder.layers.0.mlp.linear_fc2.weight"  # [96, 128]
HF_NAME = "model.layers.0.mlp.down_proj.weight"


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_gives_the_same_files_byte_by_byte(
    tmp_path: Path, family: str, tied: bool, num_files: int
) -> None:
    config = small_config(family, tied=tied)
    hf_dir = write_hf_dir(tmp_path / "hf", config, random_weights(config), num_files=num_files)
    num_bytes = import_checkpoint(hf_dir, tmp_path / "imported")
    result = export_checkpoint(tmp_path / "imported", tmp_path / "exported")
    assert contents(tmp_path / "exported") == contents(hf_dir)
    assert result.num_bytes == num_bytes == sum(tensor.nbytes for tensor in random_weights(config).values())
    assert result.casts == {}
    assert _names(tmp_path) == ["exported", "hf", "imported"]


@pytest.mark.parametrize("chunk_bytes", [1, 1000, 5000])
def test_tensors_cut_into_many_chunks(
    hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    monkeypatch.setattr(hf_import, "CHUNK_BYTES", chunk_bytes)
    import_checkpoint(hf_dir, tmp_path / "imported")
    chunks = read_metadata(tmp_path / "imported/megatron")[KEY].chunks
    assert len(chunks) == {1: 96, 1000: 32, 5000: 8}[chunk_bytes]  # of 96 rows of 256 bytes
    export_checkpoint(tmp_path / "imported", tmp_path / "exported")
    assert contents(tmp_path / "exported") == contents(hf_dir)


def test_two_dtypes_and_a_stored_tied_head_survive(tmp_path: Path) -> None:
    config = small_config(tied=True)
    weights = random_weights(config)
    weights = {name: tensor.float() if name.startswith("visual") else tensor for name, tensor in weights.items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    hf_dir = write_hf_dir(tmp_path / "hf", config, weights)
    import_checkpoint(hf_dir, tmp_path / "imported")
    export_checkpoint(tmp_path / "imported", tmp_path / "exported")
    assert contents(tmp_path / "exported") == contents(hf_dir)


def test_a_cache_whose_files_are_links_is_read_as_the_files(hf_dir: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b/snapshots/0a1b"
    snapshot.mkdir(parents=True)
    for path in hf_dir.iterdir():
        blob = tmp_path / "models--a--b" / f"{hash(path.name):x}"
        (snapshot / path.name).symlink_to(shutil.copy(path, blob))
    import_checkpoint(snapshot, tmp_path / "imported")
    shutil.rmtree(tmp_path / "models--a--b")
    export_checkpoint(tmp_path / "imported", tmp_path / "exported")
    assert contents(tmp_path / "exported") == contents(hf_dir)


def test_names_of_other_transformers_versions_survive(tmp_path: Path) -> None:
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


def test_a_checkpoint_trained_in_float32_is_exported_in_the_original_dtype(hf_dir: Path, imported_dir: Path) -> None:
    megatron_dir = imported_dir / "megatron"
    stored = read_metadata(megatron_dir)
    shutil.rmtree(megatron_dir)
    megatron_dir.mkdir()
    values = torch.linspace(-1, 1, 96 * 128).view(96, 128)
    halves = [values[:, :64].clone(), values[:, 64:].clone()]  # by columns, as row-parallel layers are
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
    kinds = {key: (tensor.dtype, tensor.shape) for key, tensor in stored.items()}
    torch_dist.write_metadata(megatron_dir, kinds, chunks)
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


def test_verify_finds_no_difference_after_import(hf_dir: Path, imported_dir: Path) -> None:
    comparison = compare_weights(hf_dir, imported_dir)
    assert comparison.num_identical == comparison.num_tensors == len(random_weights(small_config()))
    assert set(comparison.max_abs_differences.values()) == {0.0}


def test_verify_names_what_differs_and_not_what_is_nan_in_both(tmp_path: Path) -> None:
    config = small_config()
    weights = random_weights(config)
    weights["model.norm.weight"][3] = torch.nan
    import_checkpoint(write_hf_dir(tmp_path / "a", config, weights), tmp_path / "imported")
    weights[HF_NAME][95, 127] += 4
    weights["visual.merger.ln_q.weight"][0] = torch.inf
    write_hf_dir(tmp_path / "b", config, weights)
    comparison = compare_weights(tmp_path / "b", tmp_path / "imported")
    differing = {name: value for name, value in comparison.max_abs_differences.items() if value}
    assert differing == {HF_NAME: pytest.approx(4, abs=0.02), "visual.merger.ln_q.weight": float("inf")}
    assert comparison.num_identical == comparison.num_tensors - 2


def test_verify_tells_of_models_that_cannot_be_one(imported_dir: Path, tmp_path: Path) -> None:
    other = small_config("qwen2_vl")
    write_hf_dir(tmp_path / "family", other, random_weights(other))
    with pytest.raises(UserError, match=r"family is a qwen2_vl model, and .*imported a qwen2_5_vl one"):
        compare_weights(tmp_path / "family", imported_dir)
    smaller = small_config()
    smaller["num_hidden_layers"] = 1
    write_hf_dir(tmp_path / "size", smaller, random_weights(smaller))
    with pytest.raises(UserError, match=r"different sizes: ModelShape\(num_layers=1, .*ModelShape\(num_layers=2"):
        compare_weights(tmp_path / "size", imported_dir)


def _import_and_wait(hf_dir: Path, out: Path, started: Connection) -> None:
    def wait(*progress: int) -> None:
        started.send(True)
        time.sleep(600)

    import_checkpoint(hf_dir, out, progress=wait)


def test_what_a_killed_import_left_is_removed_and_that_of_one_under_way_is_not(hf_dir: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_import_and_wait, args=(hf_dir, tmp_path / "out", theirs))
    process.start()
    started.recv()
    (partial,) = tmp_path.glob(".out.partial-*")
    with new_directory(tmp_path / "out", 0):
        assert partial.exists()
    (tmp_path / "out").rmdir()
    process.kill()
    process.join()
    assert partial.exists()
    import_checkpoint(hf_dir, tmp_path / "out")
    assert _names(tmp_path) == ["hf", "out"]


@pytest.mark.parametrize("convert", [import_checkpoint, export_checkpoint])
def test_an_existing_output_is_refused_and_left_alone(
    hf_dir: Path, imported_dir: Path, tmp_path: Path, convert: Any
) -> None:
    source = hf_dir if convert is import_checkpoint else imported_dir
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(UserError, match=r"out: exists \(Directory not empty\); name a new directory"):
        convert(source, out)
    assert _names(out) == ["precious"]
    with pytest.raises(UserError, match=r"none: no such directory; create it first"):
        convert(source, tmp_path / "none/out")


@pytest.mark.parametrize("convert", [import_checkpoint, export_checkpoint])
def test_an_empty_directory_is_filled(hf_dir: Path, imported_dir: Path, tmp_path: Path, convert: Any) -> None:
    (tmp_path / "out").mkdir()
    convert(hf_dir if convert is import_checkpoint else imported_dir, tmp_path / "out")
    assert "config.json" in _names(tmp_path / "out")


@pytest.mark.parametrize("convert", [import_checkpoint, export_checkpoint])
def test_a_disk_without_the_space_is_seen_before_anything_is_written(
    hf_dir: Path, imported_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, convert: Any
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match=r"disk full: 0\.07 GB needed, 0\.00 GB free"):
        convert(hf_dir if convert is import_checkpoint else imported_dir, tmp_path / "out")
    assert _names(tmp_path) == ["hf", "imported"]


def _disk_full(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fills_up_leaves_nothing_behind(
    hf_dir: Path, imported_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_io.os, "pwrite", _disk_full)
    with pytest.raises(OSError, match="No space left on device"):
        export_checkpoint(imported_dir, tmp_path / "out")
    monkeypatch.setattr(torch, "save", _disk_full)
    with pytest.raises(OSError, match="No space left on device"):
        import_checkpoint(hf_dir, tmp_path / "out")
    assert _names(tmp_path) == ["hf", "imported"]


def test_a_damaged_source_leaves_nothing_behind(hf_dir: Path, imported_dir: Path, tmp_path: Path) -> None:
    chunks = imported_dir / "megatron/__0_0.distcp"
    chunks.write_bytes(chunks.read_bytes()[:200_000])
    with pytest.raises(UserError, match=r"__0_0\.distcp: .* cannot be read"):
        export_checkpoint(imported_dir, tmp_path / "out")
    shard = hf_dir / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: .* bytes, but its header describes"):
        import_checkpoint(hf_dir, tmp_path / "out")
    assert _names(tmp_path) == ["hf", "imported"]


def test_a_checkpoint_of_another_shape_is_refused(imported_dir: Path, tmp_path: Path) -> None:
    config = imported_dir / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    with pytest.raises(UserError, match="unexpected tensors"):
        export_checkpoint(imported_dir, tmp_path / "out")
    (imported_dir / "hf_layout.json").unlink()
    with pytest.raises(UserError, match=r"hf_layout\.json: not found"):
        export_checkpoint(imported_dir, tmp_path / "out")


def test_a_manifest_may_not_name_files_elsewhere(imported_dir: Path, tmp_path: Path) -> None:
    manifest = imported_dir / "hf_layout.json"
    manifest.write_text(manifest.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(UserError, match=r"hf_layout\.json: damaged"):
        export_checkpoint(imported_dir, tmp_path / "out")
