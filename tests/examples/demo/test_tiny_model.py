"""The demo's tiny model: its vocabulary, and its directory as a Qwen2.5-VL model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from demo.data import TASKS, VIDEO, base_samples
from demo.plan import QUICK_SIZES, ROOT
from demo.tiny_model import FAMILIES, UNKNOWN, vocabulary, write_model

from megatron_vcr1.data.encoding import encode_messages
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.scenes import random_scene, sample_of_scene
from megatron_vcr1.data.templates import PromptTemplates, build_messages, load_templates, target_text
from megatron_vcr1.data.video import VideoFrames
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.training.targets import completion_text
from megatron_vcr1.types import Sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "hf"
    write_model(path, seed=0)
    return path


@pytest.fixture(scope="module")
def processor(folder: Path) -> PromptProcessor:
    return PromptProcessor.from_pretrained(folder, ModelConfig.from_pretrained(folder))


@pytest.fixture(scope="module")
def templates() -> PromptTemplates:
    return load_templates(ROOT / "examples/demo/templates.toml")


def _samples() -> list[Sample]:
    tasks = [
        sample_of_scene(random_scene(split, index, seed=0, task=task, video_format=VIDEO), "x.mp4")
        for split in ("train", "unseen_pairs", "longer_events")
        for task in TASKS
        for index in range(20)
    ]
    return tasks + [sample for samples in base_samples(Path("data"), QUICK_SIZES).values() for sample in samples]


def test_prompts_and_responses_contain_no_unknown_words(processor: PromptProcessor, templates: PromptTemplates) -> None:
    for sample in _samples():
        texts = [target_text(sample, templates), completion_text(sample, templates, thinking=bool(sample.thinking))]
        thinkings = (False, True) if sample.task == "temporal_grounding" else (False,)
        texts += [processor.render(build_messages(sample, templates, thinking=thinking)) for thinking in thinkings]
        for text in texts:
            token_ids = processor.tokenize(text)
            assert processor.decode(token_ids, skip_special_tokens=False) == text
            assert UNKNOWN not in processor.tokenizer.convert_ids_to_tokens(token_ids.tolist())


@pytest.mark.parametrize(
    "text, num_tokens",
    [
        ("<answer>3.5 to 12.0</answer>", 5),
        ("<answer>B</answer><glue>[(0.5, 1.0)]</glue>", 7),
        ("<answer>[[0.1, 0.2, 0.5, 0.6], [0.0, 0.0, 1.0, 1.0]]</answer>", 8),
        ("<think>--9.510.010.5-</think>\n<answer>9.5 to 11.0</answer>", 12),
    ],
)
def test_times_and_box_corners_are_single_tokens(processor: PromptProcessor, text: str, num_tokens: int) -> None:
    assert len(processor.tokenize(text)) == num_tokens


def test_other_words_become_the_unknown_token(processor: PromptProcessor) -> None:
    token_ids = processor.tokenize("When is it true that the purple dog is visible?")
    assert UNKNOWN in processor.tokenizer.convert_ids_to_tokens(token_ids.tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_vocabulary_has_no_duplicates(family: str) -> None:
    assert len(set(vocabulary(family))) == len(vocabulary(family))


def test_the_directory_is_a_qwen2_5_vl_with_one_token_per_two_frames(folder: Path, processor: PromptProcessor) -> None:
    config = ModelConfig.from_pretrained(folder)
    assert config.family.model_type == "qwen2_5_vl"
    assert config.text.vocab_size == len(vocabulary())
    assert config.vision.pixel_mean == (0.5, 0.5, 0.5)
    assert (processor.factor, processor.temporal_patch_size) == (16, 2)
    assert config.video_token_id == processor.video_token_id == vocabulary().index("<|video_pad|>")


def test_a_tiny_qwen3_vl_reads_its_time_stamps(tmp_path: Path, templates: PromptTemplates) -> None:
    write_model(tmp_path, seed=0, family="qwen3_vl")
    config = ModelConfig.from_pretrained(tmp_path)
    processor = PromptProcessor.from_pretrained(tmp_path, config)
    assert config.family.model_type == "qwen3_vl"
    sample = sample_of_scene(random_scene("train", 0, seed=0, task=TASKS[0], video_format=VIDEO), "x.mp4")
    frames = torch.zeros(VIDEO.num_frames, 16, 16, 3, dtype=torch.uint8)
    times = tuple(index / VIDEO.fps for index in range(VIDEO.num_frames))
    prompt = encode_messages(
        build_messages(sample, templates, thinking=True),
        processor,
        read=lambda *_, **__: VideoFrames(frames, times, VIDEO.num_frames / VIDEO.fps, "fake"),
    )
    tokens = processor.tokenizer.convert_ids_to_tokens(prompt.token_ids.tolist())
    assert UNKNOWN not in tokens
    assert [token for token in tokens if token.endswith(" seconds>")] == [
        f"<{second}.2 seconds>" for second in range(VIDEO.num_frames // 2)
    ]
    assert prompt.vision[0].num_tokens(2) == VIDEO.num_frames // 2
