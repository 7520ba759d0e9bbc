"""Processors of model directories in all layouts of transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vcr1.data.encoding import encode_messages
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.errors import UserError
from tests.data.model_dirs import CHAT_TEMPLATE, QWEN_7B_TOKENS, TOKENS, write_json, write_model_dir


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def processor(model_dir: Path) -> PromptProcessor:
    return PromptProcessor.from_pretrained(model_dir, TOKENS)


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
    processor = PromptProcessor.from_pretrained(folder, TOKENS)
    expected = PromptProcessor.from_pretrained(model_dir, TOKENS)
    for name in ("chat_template", "image_token_id", "patch_size", "min_pixels", "max_pixels", "factor"):
        assert getattr(processor, name) == getattr(expected, name)


def test_incomplete_model_directories_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone: neither processor_config\.json nor preprocessor_config\.json"):
        PromptProcessor.from_pretrained(tmp_path / "gone", TOKENS)
    folder = write_model_dir(tmp_path / "model")
    write_json(folder / "video_preprocessor_config.json", {"patch_size": 16})
    message = r"video_preprocessor_config\.json: patch_size is 16; it must be 14, as for images .*/preprocessor_config"
    with pytest.raises(UserError, match=message):
        PromptProcessor.from_pretrained(folder, TOKENS)
    (folder / "video_preprocessor_config.json").write_text("{")
    with pytest.raises(UserError, match=r"video_preprocessor_config\.json: not JSON"):
        PromptProcessor.from_pretrained(folder, TOKENS)
    (folder / "video_preprocessor_config.json").unlink()
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"neither processor_config\.json nor preprocessor_config\.json"):
        PromptProcessor.from_pretrained(folder, TOKENS)


def test_reading_a_processor_needs_no_torchvision(model_dir: Path) -> None:
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "from megatron_vcr1.data.encoding import encode_messages\n"
        "from megatron_vcr1.data.processor import PromptProcessor\n"
        "from types import SimpleNamespace\n"
        "from megatron_vcr1.data.media_rules import MediaRules\n"
        "tokens = SimpleNamespace(num_embeddings=264, image_token_id=260, video_token_id=261, media=MediaRules())\n"
        f"processor = PromptProcessor.from_pretrained({str(model_dir)!r}, tokens)\n"
        "encode_messages([{'role': 'user', 'content': 'Hi'}], processor)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_the_published_qwen2_5_vl_directory_is_read(realdata: Path) -> None:
    processor = PromptProcessor.from_pretrained(realdata / "qwen" / "Qwen2.5-VL-7B-Instruct", QWEN_7B_TOKENS)
    assert (processor.image_token_id, processor.video_token_id) == (151655, 151656)
    assert (processor.min_pixels, processor.max_pixels) == (3136, 12845056)
    prompt = encode_messages([{"role": "user", "content": "hi"}], processor)
    system = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    assert prompt.token_ids.tolist() == [*system, 151644, 872, 198, 6023, 151645, 198, 151644, 77091, 198]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"num_embeddings": 261},
            r"token 261 of the tokenizer, '<\|video_pad\|>', has no embedding: the model has 261",
        ),
        ({"num_embeddings": 260}, r"token 260 of .*, has no embedding \(nor do 1 more\): the model has 260 embeddings"),
        ({"image_token_id": 300}, r"config\.json: image_token_id is 300, but the model has only 264 embeddings"),
        ({"video_token_id": 264}, r"config\.json: video_token_id is 264, but the model has only 264 embeddings"),
        ({"image_token_id": 5}, r"image_token_id is 5, but <\|image_pad\|> is token 260 of the tokenizer"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_model_is_refused(
    model_dir: Path, change: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        PromptProcessor.from_pretrained(model_dir, replace(TOKENS, **change))


def test_a_padded_embedding_is_accepted(model_dir: Path) -> None:
    assert PromptProcessor.from_pretrained(model_dir, replace(TOKENS, num_embeddings=1000)).video_token_id == 261


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("content", ["[]", "{", "7", "[" * 100_000, "fifo"])
def test_a_damaged_tokenizer_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    folder = write_model_dir(tmp_path / "model")
    (folder / name).unlink()
    if content == "fifo":
        os.mkfifo(folder / name)
    else:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        PromptProcessor.from_pretrained(folder, TOKENS)


@pytest.mark.parametrize("content", ["{}", '{"model": 7}', '{"model": {"type": "BPE", "vocab": []}}'])
def test_a_tokenizer_that_transformers_cannot_read_is_a_user_error(tmp_path: Path, content: str) -> None:
    folder = write_model_dir(tmp_path / "model")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        PromptProcessor.from_pretrained(folder, TOKENS)


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    folder = write_model_dir(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"model: no tokenizer \(tokenizer\.json or vocab\.json\)"):
        PromptProcessor.from_pretrained(folder, TOKENS)


def test_a_template_that_fails_is_refused_when_the_model_is_read(tmp_path: Path) -> None:
    folder = write_model_dir(tmp_path / "model")
    write_json(folder / "chat_template.json", {"chat_template": "{% if %}"})
    with pytest.raises(UserError, match=r"chat_template\.json: the chat template fails: line 1"):
        PromptProcessor.from_pretrained(folder, TOKENS)
