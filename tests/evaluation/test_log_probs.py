"""`vcr1 score` as a user types it, compared with transformers' log-probs for text, images and videos."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from megatron_vcr1.data.encoding import encode_messages
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.errors import UserError
from megatron_vcr1.evaluation.log_probs import read_requests
from megatron_vcr1.model.config import ModelConfig
from tests.commands import run_vcr1
from tests.data.tiny_processor import tiny_processor
from tests.data.video_clips import write_clip
from tests.limits import HANG_S
from tests.model import tiny

ONE_FAMILY = pytest.mark.parametrize("workspace", ["qwen2_5_vl"], indirect=True)
"""For tests of what does not depend on the model."""
ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def workspace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory, a data file with text, image and video prompts, and transformers' log-probs for it."""
    folder = tmp_path_factory.mktemp(request.param)
    stand_in = tiny_processor(patch_size=14)
    pads = dict(image_token_id=stand_in.image_token_id, video_token_id=stand_in.video_token_id)
    model = tiny.create(request.param, folder / "model", **pads)
    stand_in.tokenizer.chat_template = stand_in.chat_template.replace(
        "{% if part.type == 'video' %}",
        "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == 'video' %}",
    )
    stand_in.tokenizer.save_pretrained(folder / "model")
    settings = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 56 * 56}
    settings |= {"image_mean": tiny.MEAN, "image_std": tiny.STD}
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(settings))

    clip = write_clip(folder / "clip.mp4", num_frames=60)
    picture = torch.randint(0, 256, (90, 130, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(picture.numpy()).save(folder / "picture.png")
    requests = _requests(clip, folder / "picture.png")
    (folder / "data.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
    expected = _transformers_log_probs(model, folder / "model", requests)
    (folder / "expected.json").write_text(json.dumps(expected))
    return folder


def _requests(clip: Path, picture: Path) -> list[dict[str, Any]]:
    def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"role": "user", "content": list(parts)}]

    text = {"type": "text", "text": "When does it happen?"}
    image, video = {"type": "image", "image": str(picture)}, {"type": "video", "video": str(clip)}
    return [
        {"id": "text", "messages": user(text), "response": "From 1 to 2."},
        {"id": "image", "messages": user(image, text), "response": [30, 31, 40]},
        {"id": "video", "messages": user(video, text), "response": "<answer>0.5 to 1.5</answer>"},
        {"id": "both", "messages": user(image, text, video), "response": "B"},
    ]


def _transformers_log_probs(
    model: torch.nn.Module, model_dir: Path, requests: list[dict[str, Any]]
) -> dict[str, list[float]]:
    config = ModelConfig.from_pretrained(model_dir)
    processor = PromptProcessor.from_pretrained(model_dir, config)
    expected = {}
    for request in requests:
        prompt = encode_messages(request["messages"], processor)
        response = request["response"]
        ids = processor.tokenize(response) if isinstance(response, str) else torch.tensor(response)
        with torch.no_grad():
            logits = tiny.transformers_logits(model, config, prompt, ids)
        expected[request["id"]] = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0].tolist()
    return expected


def _arguments(folder: Path, *options: str, data: str = "data.jsonl") -> list[str]:
    files = ["--model", str(folder / "model"), "--data", str(folder / data), "--out", str(folder / "out.jsonl")]
    return ["score", "--dtype", "float32", *files, *options]


def _score(folder: Path, *options: str, ranks: int = 1, data: str = "data.jsonl") -> subprocess.CompletedProcess[str]:
    return run_vcr1(*_arguments(folder, *options, data=data), ranks=ranks, cwd=folder)


@pytest.mark.parametrize(
    "ranks, options",
    [
        (1, ["--microbatch-tokens", "100"]),
        (4, ["--tensor-parallel", "2", "--pipeline-parallel", "2", "--sequence-parallel"]),
        (4, ["--tensor-parallel", "2", "--context-parallel", "2", "--sequence-parallel"]),
    ],
)
def test_log_probs_equal_transformers(workspace: Path, ranks: int, options: list[str]) -> None:
    _check_log_probs(_score(workspace, *options, ranks=ranks), workspace)


@ONE_FAMILY
def test_torchrun_gives_the_same_log_probs(workspace: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "megatron_vcr1"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [*launcher, *_arguments(workspace, "--tensor-parallel", "2")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_S, check=False)
    _check_log_probs(result, workspace)


def _check_log_probs(result: subprocess.CompletedProcess[str], workspace: Path) -> None:
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (workspace / "out.jsonl").read_text().splitlines()]
    expected = json.loads((workspace / "expected.json").read_text())
    assert [row["id"] for row in rows] == list(expected)
    for row in rows:
        assert len(row["token_ids"]) == len(row["log_probs"])
        assert row["log_probs"] == pytest.approx(expected[row["id"]], abs=TOLERANCE)
    assert "4 scored, 0 failed" in result.stdout


@ONE_FAMILY
def test_a_bad_video_fails_only_its_own_row(workspace: Path) -> None:
    rows = [json.loads(line) for line in (workspace / "data.jsonl").read_text().splitlines()]
    missing = {"type": "video", "video": "nowhere.mp4"}
    bad = {"id": "bad", "messages": [{"role": "user", "content": [missing]}], "response": "x"}
    (workspace / "damaged.jsonl").write_text("\n".join(json.dumps(row) for row in (rows[0], bad, rows[1])))
    result = _score(workspace, data="damaged.jsonl")
    assert result.returncode == 1, result.stderr
    out = [json.loads(line) for line in (workspace / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in out] == ["text", "bad", "image"]
    assert "nowhere.mp4" in out[1]["error"]
    assert "2 scored, 1 failed" in result.stdout


@ONE_FAMILY
def test_a_malformed_request_fails_only_its_own_row(workspace: Path) -> None:
    good, _, video, _ = (json.loads(line) for line in (workspace / "data.jsonl").read_text().splitlines())
    faults: dict[str, Any] = {
        "fps": {"messages": [{"role": "user", "content": [video["messages"][0]["content"][0] | {"fps": "1"}]}]},
        "null": {"messages": [{"role": "user", "content": [video["messages"][0]["content"][0] | {"fps": None}]}]},
        "surrogate": {"messages": [{"role": "user", "content": [{"type": "text", "text": "half a pair: \ud800"}]}]},
        "surrogate in the response": {"response": "half a pair: \ud800"},
        "content": {"messages": [{"role": "user", "content": None}]},
        "part": {"messages": [{"role": "user", "content": [1]}]},
        "path": {"messages": [{"role": "user", "content": [{"type": "video", "video": 3}]}]},
        "role": {"messages": [{"role": ["user"], "content": "when?"}]},
        "token": {"response": [10**30]},
        "range": {"response": [30] * tiny.hf_config("qwen2_5_vl").text_config.max_position_embeddings},
    }
    bad = [good | fault | {"id": id} for id, fault in faults.items()]
    (workspace / "faults.jsonl").write_text("\n".join(json.dumps(row) for row in (*bad, good)))
    result = _score(workspace, data="faults.jsonl")
    rows = {row["id"]: row for row in map(json.loads, (workspace / "out.jsonl").read_text().splitlines())}
    assert list(rows) == [*faults, "text"], result.stderr
    expected = json.loads((workspace / "expected.json").read_text())
    assert rows["text"]["log_probs"] == pytest.approx(expected["text"], abs=TOLERANCE)
    scored = {id for id, row in rows.items() if "error" not in row}
    assert scored - {"role"} == {"text"}  # the tiny chat template prints any role
    assert "its rotary positions reach" in rows["range"]["error"]
    assert result.returncode == 1


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "data2.jsonl:1: not JSON"),
        ('{"id": 1, "messages": []}', 'data2.jsonl:1: needs the keys "id", "messages" and "response"'),
        ('{"id": 1, "messages": "hi", "response": "x"}', 'data2.jsonl:1: "messages" must be a list'),
        ('{"id": 1, "messages": [], "response": [-1]}', 'data2.jsonl:1: "response" must be'),
        ("", "the file holds no requests"),
    ],
)
def test_bad_data_is_refused_before_anything_is_computed(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "data2.jsonl").write_text(line)
    with pytest.raises(UserError) as error:
        read_requests(tmp_path / "data2.jsonl")
    assert message in str(error.value)


@ONE_FAMILY
def test_a_layout_that_does_not_fit_the_model_is_refused(workspace: Path) -> None:
    result = _score(workspace, "--tensor-parallel", "5")
    assert result.returncode == 2
    assert "parallel.tensor = 5 does not divide 12 attention heads" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 5_000, '{"id": "a\0"}'], ids=["deep", "long integer", "nul"])
def test_hostile_requests_are_user_errors_that_name_the_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "data.jsonl").write_text(line)
    with pytest.raises(UserError, match=r"data\.jsonl:1: not JSON"):
        read_requests(tmp_path / "data.jsonl")


def test_requests_with_a_byte_order_mark_are_read_and_a_fifo_is_refused(tmp_path: Path) -> None:
    row = {"id": "a", "messages": [{"role": "user", "content": "x"}], "response": "y"}
    (tmp_path / "data.jsonl").write_text("\ufeff" + json.dumps(row), encoding="utf-8")
    assert [request.id for request in read_requests(tmp_path / "data.jsonl")] == ["a"]
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="not a regular file"):
        read_requests(tmp_path / "pipe.jsonl")
