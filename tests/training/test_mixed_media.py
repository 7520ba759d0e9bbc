"""SFT and GRPO on text, images, videos and several of them: a pipeline with replicas trains like one process.

Prompts, rollouts, rewards and updates come from the manifest's rows, as in a user's run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.parallel import mesh
from megatron_vcr1.training.train import train, train_in_world
from tests.gloo import GlooPool
from tests.training import workspace

pytestmark = pytest.mark.xdist_group("gloo")

NUM_STEPS = 2
MEDIA: tuple[dict[str, Any], ...] = (
    {},
    {"image": "red.png"},
    {"video": "a.mp4"},
    {"videos": ["a.mp4", {"video": "b.mp4", "clip": [0, 1]}]},
    {"query": "is <image> in <video>?", "image": "red.png", "video": "b.mp4"},
    {"images": ["red.png", "blue.png"]},
    {"query": "<video>?"},  # ordinary text, because there is no video
    {"query": "which?", "image": "blue.png", "options": ["<image>", "none"]},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = workspace.create(tmp_path_factory.mktemp("media"), num_videos=2)
    for name, video in zip("ab", sorted((folder / "data").rglob("*.mp4")), strict=False):
        (folder / "data" / f"{name}.mp4").symlink_to(video)
    for colour in ("red", "blue"):
        PIL.Image.new("RGB", (84, 56), colour).save(folder / "data" / f"{colour}.png")
    question = {"task": "multiple_choice_qa", "query": "what?", "options": ["x", "y"], "target": {"choice": "A"}}
    rows = [{"id": str(index), **question, **media} for index, media in enumerate(MEDIA)]
    (folder / "data" / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _config(folder: Path, stage: str, name: str, **sections: dict[str, Any]) -> RunConfig:
    source = {"manifest": folder / "data" / "mixed.jsonl", "thinking": False}
    source["rewards"] = ["tests.training.own_rewards:variety"]
    run = {"stage": stage, "run_dir": folder / "runs" / f"{stage}-{name}", "num_steps": NUM_STEPS}
    return workspace.config(
        folder,
        stage,
        train={**run, "prompts_per_step": 4, "microbatch_tokens": 120},
        data={**workspace.config(folder, stage).data.model_dump(), "sources": [source]},
        grpo={"group_size": 2},
        **sections,
    )


def _train(config: RunConfig) -> int:
    mesh.initialize(config.parallel)
    return train_in_world(config, ModelConfig.from_pretrained(config.model.path))


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_every_combination_of_media_trains_in_a_pipeline_as_in_one_process(
    folder: Path, gloo_pool: GlooPool, stage: str
) -> None:
    alone = _config(folder, stage, "alone")
    assert train(alone) == 0
    split = _config(folder, stage, "split", parallel={"pipeline": 2})
    assert gloo_pool.run(_train, split) == [0] * 4
    for mine, expected in zip(*map(workspace.metrics, (split.train.run_dir, alone.train.run_dir)), strict=True):
        assert mine["grad_norm"] > 0 and mine["skipped_samples"] == 0
        for name in ("loss", "grad_norm", "response_tokens/mean"):
            assert mine[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), (mine["step"], name)
    if stage == "grpo":
        files = [config.train.run_dir / "rollouts" / f"step_{NUM_STEPS}.jsonl" for config in (split, alone)]
        mine, expected = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
        assert [row["sample"] for row in mine] == [row["sample"] for row in expected]
        texts = [[[response["text"] for response in row["responses"]] for row in rows] for rows in (mine, expected)]
        assert texts[0] == texts[1]
