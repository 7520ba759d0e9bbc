"""Every example configuration does a step on a tiny model, with paths, engine and sizes for a small machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vcr1.config.loading import load_config
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.scenes import PAPER_TASKS
from megatron_vcr1.training.train import train
from tests.training import workspace

pytestmark = pytest.mark.one_lane

FOLDER = Path(__file__).parents[2] / "examples" / "configs"
FOLDERS = (FOLDER, FOLDER / "paper")
EXAMPLES = sorted(path for folder in FOLDERS for stage in ("grpo", "sft") for path in folder.glob(f"{stage}_*.toml"))
# Files that differ from another one only in what a single step on one process does not show.
SAME_STEP = ("qa_thinking", "joint_thinking", "grounding_thinking", "_3_epochs", "_4_nodes", "_and_grounded_qa")
SAME_STEP += ("sft_multiple_choice_qa", "sft_quality", "_qwen3_vl", "_qwen3_vl_moe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with samples of all tasks in one manifest, each with some reasoning."""
    folder = workspace.create(tmp_path_factory.mktemp("examples"), tasks=list(PAPER_TASKS), num_videos=6)
    manifest = folder / "data" / "train.jsonl"
    manifest.write_text(manifest.read_text().replace('{"id"', '{"thinking": "so it is", "id"'))
    return folder


def _shrink(config: RunConfig, folder: Path, run_dir: Path) -> RunConfig:
    """Return the configuration with the same method but fewer prompts and tokens, for one process."""
    tables: dict[str, dict[str, Any]] = config.model_dump()
    small = workspace.config(folder, config.train.stage)
    tables["model"]["path"] = folder / "model"
    tables["parallel"] = {}
    sources = [source | {"manifest": folder / "data" / "train.jsonl"} for source in tables["data"]["sources"]]
    tables["data"] = {**small.data.model_dump(), "sources": sources}
    minibatches = tables["grpo"]["num_minibatches"]
    tables["train"] |= {"run_dir": run_dir, "num_steps": 1, "prompts_per_step": 2 * minibatches}
    tables["optimizer"] |= {"warmup_steps": 0}
    tables["grpo"] |= {"group_size": 2, "overlong_buffer_tokens": min(4, tables["grpo"]["overlong_buffer_tokens"])}
    tables["grpo"] |= {"one_step_off": False, "max_refills": 1}
    tables["rollout"] |= {"engine": "local", "max_new_tokens": 6}
    tables["judge"] |= {"kind": "lexical"}
    tables["checkpoint"] |= {"export": "never"}
    return RunConfig.model_validate(tables)


def test_every_task_and_method_has_an_example() -> None:
    names = {path.stem for path in EXAMPLES}
    assert names >= {f"grpo_{task}" for task in PAPER_TASKS}
    assert names >= {
        "grpo_joint",
        "grpo_joint_thinking",
        "grpo_dr",
        "grpo_dapo",
        "grpo_gspo",
        "grpo_one_step_off",
        "sft_joint",
        "sft_thinking",
    }


@pytest.mark.parametrize(
    "example",
    [path for path in EXAMPLES if not path.stem.endswith(SAME_STEP)],
    ids=lambda path: path.stem,
)
def test_example_does_a_step(folder: Path, tmp_path: Path, example: Path) -> None:
    config = load_config(example)
    assert config.model.dtype == "bfloat16"
    assert train(_shrink(config, folder, tmp_path / "run")) == 0
    (row,) = workspace.metrics(tmp_path / "run")
    assert row["step"] == 1 and row["update_skipped"] == 0 and row["loss"] is not None
