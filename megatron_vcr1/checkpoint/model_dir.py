"""Model directories: what stands where in a Hugging Face directory and in an imported one.

An imported directory holds
    config.json, tokenizer and processor files    as they were in the Hugging Face directory
    hf_layout.json                                the headers of its safetensors files, which an export writes back
    megatron/                                     the weights, a megatron-core ``torch_dist`` checkpoint
A training checkpoint that is to be exported has the same three parts (`copy_model_files` makes the first two), and two
files of its own: checksums.json and state.json.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from megatron_vcr1.checkpoint.safetensors_io import SafetensorsHeader, SafetensorsReader, parse_header
from megatron_vcr1.errors import UserError

MEGATRON_DIR = "megatron"
MANIFEST_FILE = "hf_layout.json"
CHECKSUMS_FILE = "checksums.json"
STATE_FILE = "state.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_MANIFEST_VERSION = 1
_OWN_FILES = (MANIFEST_FILE, CHECKSUMS_FILE, STATE_FILE)  # of an imported directory or a checkpoint, not of its model
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


def is_imported(model_dir: Path) -> bool:
    """Whether the directory holds a Megatron checkpoint (imported, or saved by training) instead of safetensors."""
    return (model_dir / MEGATRON_DIR).is_dir()


def weight_files(hf_dir: Path) -> list[str]:
    """Names of the safetensors files of a Hugging Face directory, sorted.

    Raises:
        UserError: the directory or its index is missing or damaged, or it holds no safetensors, or two sets of them.
    """
    if not hf_dir.is_dir():
        raise UserError(f"{hf_dir}: no such directory; name a downloaded Hugging Face model")
    if is_imported(hf_dir):
        raise UserError(f"{hf_dir}: its weights are a Megatron checkpoint, not safetensors; export it first")
    index_path = hf_dir / INDEX_FILE
    single = {SINGLE_FILE} if (hf_dir / SINGLE_FILE).exists() else set()
    indexed = set(_weight_map(index_path).values()) if index_path.exists() else set()
    if single and indexed - single:
        raise UserError(
            f"{hf_dir}: holds two models: {SINGLE_FILE}, which transformers would read, and the files of {INDEX_FILE}; "
            "remove the one that is out of date"
        )
    if not single | indexed:
        raise UserError(f"{hf_dir}: neither {INDEX_FILE} nor {SINGLE_FILE}; only safetensors weights are read")
    return sorted(single | indexed)


def _weight_map(index_path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index_path.read_text())["weight_map"]
        if any(Path(name).name != name for name in weight_map.values()):
            raise ValueError("a file name in weight_map has a directory part")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index_path}: not a safetensors index ({error!r}); fetch it again") from None
    return weight_map


def read_headers(hf_dir: Path) -> dict[str, SafetensorsHeader]:
    """The headers of a Hugging Face directory's safetensors files, by file name.

    Raises:
        UserError: a file is missing or not whole, or the index and the files disagree about a tensor.
    """
    headers = {}
    for name in weight_files(hf_dir):
        with SafetensorsReader(hf_dir / name) as reader:
            headers[name] = reader.header
    index_path = hf_dir / INDEX_FILE
    if index_path.exists():
        found = {tensor.name: name for name, header in headers.items() for tensor in header.tensors}
        indexed = _weight_map(index_path)
        differing = sorted(tensor for tensor in found.keys() | indexed if found.get(tensor) != indexed.get(tensor))
        if differing:
            tensor = differing[0]
            raise UserError(
                f"{index_path}: places {tensor} in {indexed.get(tensor)}, but it is in {found.get(tensor)}"
                f" ({len(differing)} such tensors); fetch the files and their index from one revision"
            )
    return headers


def read_manifest(model_dir: Path) -> dict[str, SafetensorsHeader]:
    """The safetensors headers that an export of ``model_dir`` writes, by file name.

    Raises:
        UserError: the manifest is missing or damaged.
    """
    path = model_dir / MANIFEST_FILE
    try:
        manifest = json.loads(path.read_text())
        if manifest["version"] != _MANIFEST_VERSION:
            raise UserError(f"{path}: version {manifest['version']}; this program reads version {_MANIFEST_VERSION}")
        texts = {str(name): str(text) for name, text in manifest["headers"].items()}
        if any(Path(name).name != name for name in texts):
            raise ValueError("a file name has a directory part")
    except FileNotFoundError:
        raise UserError(
            f"{path}: not found; name a directory made by import, or a checkpoint made by training"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: damaged ({error!r}); import the model again") from None
    return {name: parse_header(text, path) for name, text in texts.items()}


def model_headers(model_dir: Path) -> dict[str, SafetensorsHeader]:
    """`read_manifest` of an imported directory, `read_headers` of a Hugging Face one."""
    return read_manifest(model_dir) if is_imported(model_dir) else read_headers(model_dir)


def copy_model_files(model_dir: Path, destination: Path, *, manifest: bool = True) -> None:
    """Copy everything but the weights: configuration, tokenizer, processor, licence, index.

    Args:
        model_dir: a Hugging Face or an imported directory.
        destination: an existing directory.
        manifest: also write hf_layout.json, which makes ``destination`` exportable; False for a Hugging Face directory.
    """
    for source in sorted(model_dir.iterdir()):
        if source.is_file() and source.suffix not in _WEIGHT_SUFFIXES and source.name not in _OWN_FILES:
            write_durably(destination / source.name, source.read_bytes())
    if manifest:
        texts = {name: header.text for name, header in model_headers(model_dir).items()}
        content = json.dumps({"version": _MANIFEST_VERSION, "headers": texts}, indent=1)
        write_durably(destination / MANIFEST_FILE, content.encode())


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file, down to the disk. Raises OSError."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
