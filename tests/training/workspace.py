"""Workspaces for tests: a tiny model with a tokenizer, synthesized videos with short prompts, and settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.synthesize import synthesize
from tests.data.tiny_processor import tiny_processor
from tests.model import tiny

TEMPLATES = """
time_decimals = 1
coordinate_decimals = 1
[temporal_grounding]
answer = "when? $query"
think = "think: when? $query"
[tracking]
answer = "where? $query $num_frames $first_box"
think = "think: where? $query $num_frames $first_box"
[grounded_qa]
answer = "which and when? $query $options"
think = "think: which and when? $query $options"
[multiple_choice_qa]
answer = "which? $query $options"
think = "think: which? $query $options"
[captioning]
answer = "what happens?"
think = "think: what happens?"
[quality]
answer = "how good? $query"
think = "think: how good? $query"
"""


def create(
    folder: Path, *, family: str = "qwen2_5_vl", tasks: Sequence[str] = ("temporal_grounding",), num_videos: int = 8
) -> Path:
    """Create model/, data/train.jsonl with its videos, and templates.toml in a folder, and return the folder."""
    processor = tiny_processor(patch_size=14)
    pads = dict(image_token_id=processor.image_token_id, video_token_id=processor.video_token_id)
    tiny.create(family, folder / "model", **pads)
    processor.tokenizer.eos_token = "<|im_end|>"
    processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(folder / "model")
    settings = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 56 * 56}
    settings |= {"image_mean": tiny.MEAN, "image_std": tiny.STD}
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(settings))
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    (folder / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    for _ in synthesize(folder / "data", num_videos=num_videos, num_test_videos=1, seed=0, tasks=tasks):
        pass
    (folder / "templates.toml").write_text(TEMPLATES)
    return folder


def config(folder: Path, stage: str, **sections: dict[str, Any]) -> RunConfig:
    """Return settings of a short run in float32. `sections` replaces keys: `train={"num_steps": 2}`."""
    tables: dict[str, dict[str, Any]] = {
        "model": {"path": folder / "model", "dtype": "float32"},
        "data": {
            "sources": [{"manifest": folder / "data" / "train.jsonl", "thinking": False}],
            "templates": folder / "templates.toml",
            "max_frames": 8,
            "total_pixels": 4 * 28 * 28,
            "min_pixels": 28 * 28,
            "num_workers": 0,
        },
        "train": {"stage": stage, "run_dir": folder / "run", "num_steps": 2, "prompts_per_step": 4},
        "optimizer": {"learning_rate": 1e-3},
        "rollout": {"max_new_tokens": 8},
        "grpo": {"group_size": 4},
        "checkpoint": {"export": "never"},
        "logging": {"tensorboard": False},
    }
    for name, keys in sections.items():
        tables[name] = {**tables.get(name, {}), **keys}
    return RunConfig.model_validate(tables)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
