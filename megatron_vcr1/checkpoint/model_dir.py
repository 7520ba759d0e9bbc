"""Model directories: the files of a Hugging Face directory, of an imported model and of a training checkpoint.

An imported model consists of
    config.json, tokenizer and processor files    unchanged copies from the Hugging Face directory
    hf_layout.json                                headers of its safetensors files, which an export restores
    megatron/                                     the weights, as a megatron-core ``torch_dist`` checkpoint
A training checkpoint has the same three parts (`copy_model_files` writes the first two), so that it can be exported,
and two files of its own: checksums.json and state.json.
"""

from __future__ import annotations

import json
import reprlib
from pathlib import Path

from megatron_vcr1.checkpoint.disk import copy_durably, write_durably
from megatron_vcr1.checkpoint.safetensors_io import SafetensorsHeader, SafetensorsReader, parse_header
from megatron_vcr1.errors import UserError
from megatron_vcr1.json_fields import Fields

MEGATRON_DIR = "megatron"
HF_LAYOUT_FILE = "hf_layout.json"
CHECKSUMS_FILE = "checksums.json"
STATE_FILE = "state.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_config.json"
_HF_LAYOUT_VERSION = 1
_OWN_FILES = (HF_LAYOUT_FILE, CHECKSUMS_FILE, STATE_FILE)  # not copied: the copy gets its own
_TEMPLATES_DIR = "additional_chat_templates"  # the only folder that transformers writes beside the other files
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


def is_imported(model_dir: Path) -> bool:
    """Return whether a directory holds a Megatron checkpoint (imported, or saved by training) and not safetensors."""
    return (model_dir / MEGATRON_DIR).is_dir()


def weight_files(hf_dir: Path) -> list[str]:
    """Return the names of the safetensors files of a Hugging Face directory, sorted.

    Raises:
        UserError: the directory is missing, its index is damaged, or it holds no safetensors, two models, or an adapter
            beside the model.
    """
    if not hf_dir.is_dir():
        raise UserError(f"{hf_dir}: no such directory; give the path of a downloaded Hugging Face model")
    if is_imported(hf_dir):
        raise UserError(f"{hf_dir}: its weights are a Megatron checkpoint, not safetensors; export it first")
    index_path = hf_dir / INDEX_FILE
    single = {SINGLE_FILE} if (hf_dir / SINGLE_FILE).exists() else set()
    indexed = set(_weight_map(index_path).values()) if index_path.exists() else set()
    if single and indexed - single:
        raise UserError(
            f"{hf_dir}: holds two models: {SINGLE_FILE}, which transformers would read, and the files of {INDEX_FILE}; "
            "remove the outdated one"
        )
    if not single | indexed:
        raise UserError(f"{hf_dir}: has neither {INDEX_FILE} nor {SINGLE_FILE}; {_advice_without_weights(hf_dir)}")
    if (hf_dir / ADAPTER_FILE).exists():
        raise UserError(
            f"{hf_dir}: holds a LoRA adapter ({ADAPTER_FILE}) beside the model, and transformers would add it to the "
            "model; merge it, or, if the weights contain it already, remove the adapter's files"
        )
    return sorted(single | indexed)


def _advice_without_weights(hf_dir: Path) -> str:
    if (hf_dir / ADAPTER_FILE).exists():
        return "it holds a LoRA adapter: merge it into its base model, and name the directory of the result"
    if others := sorted(path.name for path in hf_dir.iterdir() if path.suffix in _WEIGHT_SUFFIXES):
        return f"{others[0]} cannot be read: save the model again with save_pretrained of transformers"
    return "download the model's weights, too"


def _weight_map(index_path: Path) -> dict[str, str]:
    files = Fields.from_file(index_path).section("weight_map")
    for tensor, name in files.values.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise files.error(tensor, "must be the name of a file in the same directory; download the index again")
    return dict(files.values)


def read_headers(hf_dir: Path) -> dict[str, SafetensorsHeader]:
    """Read the headers of a Hugging Face directory's safetensors files; returns them by file name.

    Raises:
        UserError: a file is missing or truncated, or the index and the files disagree about a tensor.
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
                f" ({len(differing)} such tensors); download the files and their index from one revision"
            )
    return headers


def read_hf_layout(model_dir: Path) -> dict[str, SafetensorsHeader]:
    """Read hf_layout.json: the safetensors headers that an export of ``model_dir`` writes, by file name.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = model_dir / HF_LAYOUT_FILE
    if not path.exists():
        raise UserError(
            f"{path}: not found; give the path of an imported model, or of a checkpoint that training has written"
        )
    content = Fields.from_file(path)
    version = content.values.get("version")
    if version != _HF_LAYOUT_VERSION:
        raise UserError(
            f"{path}: has version {reprlib.repr(version)}, but only version {_HF_LAYOUT_VERSION} can be read; import "
            "the model again"
        )
    texts = content.section("headers").values
    if any(Path(name).name != name or not isinstance(text, str) for name, text in texts.items()):
        raise UserError(f"{path}: damaged: headers must be the texts of headers by file name; import the model again")
    return {name: parse_header(text, path) for name, text in texts.items()}


def model_headers(model_dir: Path) -> dict[str, SafetensorsHeader]:
    """Return the safetensors headers of a Hugging Face directory, or those that an imported model was read from."""
    return read_hf_layout(model_dir) if is_imported(model_dir) else read_headers(model_dir)


def copy_model_files(model_dir: Path, destination: Path, *, hf_layout: bool = True) -> None:
    """Copy all files except the weights, durably: configuration, tokenizer, processor, chat templates, licence, index.

    Other folders are left out: those of a trainer's output directory hold its checkpoints and logs.

    Args:
        model_dir: a Hugging Face directory, an imported model or a training checkpoint.
        destination: an existing directory.
        hf_layout: whether to write hf_layout.json too, which makes ``destination`` exportable. False if
            ``destination`` becomes a Hugging Face directory.
    """
    templates = sorted((model_dir / _TEMPLATES_DIR).glob("*.jinja"))
    if templates:
        (destination / _TEMPLATES_DIR).mkdir()
    for source in (*sorted(model_dir.iterdir()), *templates):
        if source.is_file() and source.suffix not in _WEIGHT_SUFFIXES and source.name not in _OWN_FILES:
            copy_durably(source, destination / source.relative_to(model_dir))
    if hf_layout:
        texts = {name: header.text for name, header in model_headers(model_dir).items()}
        content = json.dumps({"version": _HF_LAYOUT_VERSION, "headers": texts}, indent=1)
        write_durably(destination / HF_LAYOUT_FILE, content.encode())
