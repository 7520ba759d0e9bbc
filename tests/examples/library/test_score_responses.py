"""examples/library/score_responses.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

from megatron_vcr1.data.encoding import encode_messages
from megatron_vcr1.data.manifest import read_manifest
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.model.config import ModelConfig
from tests.model import tiny

RESPONSES = ["at 2.0 s", "from 1.0 to 3.0"]


def test_log_probs_match_transformers(
    load_example: Callable[[str], ModuleType], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model_dir = folder / "model"
    video = str(read_manifest(folder / "data/train.jsonl")[0].media[0].path)
    example = load_example("score_responses")
    log_probs = example.score(model_dir, video, "when?", RESPONSES)

    reference = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(model_dir).float().eval()
    config = ModelConfig.from_pretrained(model_dir)
    processor = PromptProcessor.from_pretrained(model_dir, config)
    content = [{"type": "video", "video": video}, {"type": "text", "text": "when?"}]
    prompt = encode_messages([{"role": "user", "content": content}], processor)
    for response, values in zip(RESPONSES, log_probs, strict=True):
        ids = processor.tokenize(response)
        with torch.no_grad():
            logits = tiny.transformers_logits(reference, config, prompt, ids)
        expected = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)

    example.main(["--model", str(model_dir), "--video", video, "--prompt", "when?", *RESPONSES])
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [float(row.split()[0]) for row in rows] == pytest.approx([float(v.sum()) for v in log_probs], abs=1e-3)
    assert [row.partition(": ")[2] for row in rows] == RESPONSES
