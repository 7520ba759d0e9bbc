"""Processors of model directories in all layouts of transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vcr1.data.encoding import encode_messages
from megatron_vcr1.data.processor import PromptProcessor
from tests.data.model_dirs import CHAT_TEMPLATE, write_json, write_model_dir


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def processor(model_dir: Path) -> PromptProcessor:
    return PromptProcessor.from_pretrained(model_dir)


@pytest.mark.parametrize("layout", ["processor_config", "video_preprocessor_config", "jinja", "size"])
def test_every_layout_of_a_model_directory_is_read(tmp_path: Path, model_dir: Path, layout: str) -> None:
    folder = write_model_dir(tmp_path / "model")
    image = json.loads((folder / "preprocessor_config.json").read_text())
    if layout == "processor_config":  # transformers 5
        (folder / "preprocessor_config.json").unlink()
        size = {"shortest_edge": image.pop("min_pixels"), "longest_edge": image.pop("max_pixels")}
        write_json(
            folder / "processor_config.json", {"image_processor": image | {"size": size}, "video_processor": image}
        )
    elif layout == "video_preprocessor_config":
        write_json(folder / "video_preprocessor_config.json", image)
    elif layout == "jinja":
        (folder / "chat_template.json").unlink()
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    else:
        size = {"min_pixels": image.pop("min_pixels"), "max_pixels": image.pop("max_pixels")}
        write_json(folder / "preprocessor_config.json", image | {"size": size})
    processor, expected = PromptProcessor.from_pretrained(folder), PromptProcessor.from_pretrained(model_dir)
    for name in ("chat_template", "image_token_id", "patch_size", "min_pixels", "max_pixels", "factor"):
        assert getattr(processor, name) == getattr(expected, name)


def test_incomplete_model_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json: not found; name a Hugging Face model directory"):
        PromptProcessor.from_pretrained(tmp_path / "gone")
    folder = write_model_dir(tmp_path / "model")
    write_json(folder / "video_preprocessor_config.json", {"patch_size": 16})
    with pytest.raises(ValueError, match="patch_size is 14 for images and 16 for videos"):
        PromptProcessor.from_pretrained(folder)
    (folder / "video_preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"video_preprocessor_config\.json: not valid JSON"):
        PromptProcessor.from_pretrained(folder)
    (folder / "video_preprocessor_config.json").unlink()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither processor_config\.json nor preprocessor_config\.json"):
        PromptProcessor.from_pretrained(folder)


def test_reading_a_processor_needs_no_torchvision(model_dir: Path) -> None:
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from megatron_vcr1.data.encoding import encode_messages\n"
        "from megatron_vcr1.data.processor import PromptProcessor\n"
        f"processor = PromptProcessor.from_pretrained({str(model_dir)!r})\n"
        "encode_messages([{'role': 'user', 'content': 'Hi'}], processor)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_the_published_qwen2_5_vl_directory_is_read(realdata: Path) -> None:
    processor = PromptProcessor.from_pretrained(realdata / "qwen" / "Qwen2.5-VL-7B-Instruct")
    assert (processor.image_token_id, processor.video_token_id) == (151655, 151656)
    assert (processor.min_pixels, processor.max_pixels) == (3136, 12845056)
    prompt = encode_messages([{"role": "user", "content": "hi"}], processor)
    system = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    assert prompt.token_ids.tolist() == [*system, 151644, 872, 198, 6023, 151645, 198, 151644, 77091, 198]
