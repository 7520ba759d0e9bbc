"""`vcr1 generate` as a user types it, compared with transformers' greedy response."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_vcr1.checkpoint.hf_import import import_checkpoint
from megatron_vcr1.cli.main import main
from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.encoding import EncodedPrompt, encode_messages
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.evaluation import single_prompt
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.engine import SamplingParams
from tests.commands import run_vcr1
from tests.data.tiny_processor import tiny_processor
from tests.data.video_clips import write_clip
from tests.gloo import GlooPool
from tests.model import tiny

ROOT = Path(__file__).parents[2]
NUM_TOKENS = 6


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory and its import, a clip, a picture, and transformers' greedy response to both with a text."""
    folder = tmp_path_factory.mktemp("generate")
    stand_in = tiny_processor(patch_size=14)
    pads = dict(image_token_id=stand_in.image_token_id, video_token_id=stand_in.video_token_id)
    model = tiny.create("qwen2_5_vl", folder / "model", **pads)
    stand_in.tokenizer.chat_template = stand_in.chat_template.replace(
        "{% if part.type == 'video' %}",
        "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == 'video' %}",
    )
    stand_in.tokenizer.save_pretrained(folder / "model")
    settings = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 56 * 56}
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(settings))
    (folder / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [201, 202]}))
    write_clip(folder / "clip.mp4", num_frames=60)
    picture = torch.randint(0, 256, (90, 130, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(picture.numpy()).save(folder / "picture.png")
    answer = _transformers_answer(model, folder)
    (folder / "expected.json").write_text(json.dumps(answer))
    import_checkpoint(folder / "model", folder / "imported")
    return folder


def _transformers_answer(model: torch.nn.Module, folder: Path) -> list[int]:
    config = ModelConfig.from_pretrained(folder / "model")
    processor = PromptProcessor.from_pretrained(folder / "model", config)
    content = [
        {"type": "image", "image": str(folder / "picture.png")},
        {"type": "video", "video": str(folder / "clip.mp4"), "fps": 1.0},
        {"type": "text", "text": "When?"},
    ]
    prompt = encode_messages([{"role": "user", "content": content}], processor)
    vision_ids = processor.tokenizer.convert_tokens_to_ids(list(processor.vision_tokens))
    token_ids: list[int] = []
    for _ in range(NUM_TOKENS):
        with torch.no_grad():
            logits = tiny.transformers_logits(model, config, prompt, torch.tensor([*token_ids, 0]))[-1]
        logits[vision_ids] = -torch.inf
        token_ids.append(int(logits.argmax()))
    return token_ids


def _generate(folder: Path, *options: str, model: str = "model", ranks: int = 1) -> subprocess.CompletedProcess[str]:
    command = ["generate", "--dtype", "float32", "--model", folder / model, "--max-new-tokens", NUM_TOKENS]
    return run_vcr1(*command, "--prompt", "When?", *options, ranks=ranks, cwd=folder)


VISION = ("--image", "picture.png", "--video", "clip.mp4", "--fps", "1")


def test_the_response_equals_transformers_greedy_response(workspace: Path) -> None:
    result = _generate(workspace, *VISION, "--json", model="imported")
    assert result.returncode == 0, result.stderr
    row: dict[str, Any] = json.loads(result.stdout)
    assert row["token_ids"] == json.loads((workspace / "expected.json").read_text())
    assert row["finish_reason"] == "length"
    assert len(row["log_probs"]) == NUM_TOKENS
    assert set(row["seconds"]) == {"prompt", "load", "first_token", "further_tokens"}


def test_text_goes_to_stdout_and_timings_to_stderr(workspace: Path) -> None:
    processor = PromptProcessor.from_pretrained(workspace / "model", ModelConfig.from_pretrained(workspace / "model"))
    result = _generate(workspace, *VISION, "--tensor-parallel", "2", ranks=2)
    assert result.returncode == 0, result.stderr
    expected = processor.decode(json.loads((workspace / "expected.json").read_text()))
    assert result.stdout == expected + "\n"
    assert f"{NUM_TOKENS - 1} more in" in result.stderr
    assert "tokens/s" in result.stderr


def _num_decodings(folder: Path) -> int:
    calls: list[object] = []

    def encode(*args: Any) -> EncodedPrompt:
        calls.append(args)
        return encode_messages(*args)

    @contextmanager
    def joined(parallel: ParallelSection) -> Iterator[None]:  # the pool's processes are used again afterwards
        mesh.initialize(parallel)
        yield

    content = [{"type": "video", "video": str(folder / "clip.mp4"), "fps": 1.0}, {"type": "text", "text": "When?"}]
    run = RunConfig.model_validate(
        {"model": {"path": folder / "model", "dtype": "float32"}, "parallel": {"tensor": 2, "pipeline": 2}}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single_prompt, "encode_messages", encode)
        patch.setattr(mesh, "world", joined)
        single_prompt.generate_response(
            run, {"role": "user", "content": content}, SamplingParams(2), seed=0, as_json=True
        )
    return len(calls)


@pytest.mark.xdist_group("gloo")
def test_a_video_is_decoded_once_for_all_ranks(workspace: Path, gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(_num_decodings, workspace) == [1, 0, 0, 0]


@pytest.mark.parametrize(
    "options, message",
    [
        (("--video", "nowhere.mp4"), "nowhere.mp4: "),
        (("--model", "nowhere"), "nowhere/config.json: not found"),
        (("--tensor-parallel", "2"), "1 ranks cannot be split into replicas"),
    ],
)
def test_bad_input_is_refused_with_its_name(
    workspace: Path, options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--model", str(workspace / "model"), "--prompt", "When?", *options]) == 2
    assert message in capsys.readouterr().err
