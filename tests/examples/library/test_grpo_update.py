"""examples/library/grpo_update.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from megatron_vcr1.data.manifest import read_manifest
from megatron_vcr1.types import Sample


def test_update_makes_better_responses_more_likely(
    load_example: Callable[[str], ModuleType],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    example = load_example("grpo_update")
    for name, value in {"GROUP_SIZE": 4, "MAX_NEW_TOKENS": 6, "LEARNING_RATE": 1e-3}.items():
        monkeypatch.setattr(example, name, value)
    # A random model earns no reward of the paper's, so equal rewards would leave the weights as they are.
    monkeypatch.setattr(example, "reward", _reward_of_characters)
    arguments = ["--model", "model", "--manifest", "data/train.jsonl", "--templates", "templates.toml"]
    monkeypatch.chdir(folder)
    example.main(arguments)

    rows = [line.split(maxsplit=4) for line in capsys.readouterr().out.splitlines()[-4:]]
    rewards, advantages, before, after = ([float(row[index]) for row in rows] for index in range(4))
    assert len(set(rewards)) > 1
    assert sum(advantages) == pytest.approx(0, abs=1e-2)
    best, worst = rewards.index(max(rewards)), rewards.index(min(rewards))
    assert after[best] > before[best] and after[worst] < before[worst]


def test_paper_reward_of_an_exact_answer(load_example: Callable[[str], ModuleType], folder: Path) -> None:
    sample = read_manifest(folder / "data/train.jsonl")[0]
    (interval,) = sample.intervals
    example = load_example("grpo_update")
    assert example.reward(sample, f"<answer>{interval.start_s} to {interval.end_s}</answer>") == pytest.approx(2)
    assert example.reward(sample, "no answer") == 0


def _reward_of_characters(sample: Sample, completion: str) -> float:
    return len(set(completion)) / 10
