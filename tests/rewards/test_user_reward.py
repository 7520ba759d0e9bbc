from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_vcr1.errors import UserError
from megatron_vcr1.rewards import load_reward
from megatron_vcr1.types import RewardPart
from megatron_vcr1.user_modules import UserCodeError
from tests.rewards.samples import sample

SOURCE = """
from functools import cache, partial
from math import hypot

import numpy as np
import torch

from megatron_vcr1.types import RewardPart

SCALE = 2

def brevity(sample, completion):
    return SCALE / len(completion)

def with_reason(sample, completion):
    return RewardPart(0.0, "too long")

def not_a_number(sample, completion):
    return float("nan")

def returns_nothing(sample, completion):
    completion.upper()

def a_pair(sample, completion):
    return 0.5, "too long"

def numpy_part(sample, completion):
    return RewardPart(np.float32(0.5), ValueError("too long"))

def torch_part(sample, completion):
    return RewardPart(torch.tensor(0.5))

def scaled(sample, completion, scale):
    return scale

half = partial(scaled, scale=0.5)

@cache
def cached(sample, completion):
    return 0.5

class Reward:
    def __init__(self, sample, completion): ...

def takes_only_a_sample(sample):
    return 1.0
"""


@pytest.fixture
def my_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"rewards_of_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(SOURCE)
    (tmp_path / f"{name}_broken.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_a_function_is_found_and_called(my_rewards: str) -> None:
    reward = load_reward(f"{my_rewards}:brevity")
    assert (reward.part, reward.source) == (f"{my_rewards}:brevity",) * 2
    assert reward(sample("quality"), "four") == RewardPart(0.5)


def test_a_function_may_name_its_part_and_give_a_reason(my_rewards: str) -> None:
    reward = load_reward(f"length = {my_rewards}:with_reason".replace(" ", ""))
    assert reward.part == "length"
    assert reward(sample("quality"), "four") == RewardPart(0.0, "too long")


@pytest.mark.parametrize("function", ["half", "cached"])
def test_partial_and_decorated_functions_are_called(my_rewards: str, function: str) -> None:
    assert load_reward(f"{my_rewards}:{function}")(sample("quality"), "four") == RewardPart(0.5)


@pytest.mark.parametrize("function, reason", [("numpy_part", "too long"), ("torch_part", None)])
def test_numbers_of_other_libraries_become_floats(my_rewards: str, function: str, reason: str | None) -> None:
    part = load_reward(f"{my_rewards}:{function}")(sample("quality"), "four")
    assert json.loads(json.dumps([part.value, part.reason])) == [0.5, reason]


@pytest.mark.parametrize(
    "name",
    ["", "brevity", "my.module:", ":brevity", "my module:f", "m:f()", "a:b:c", "..m:f", "=m:f", "total=m:f", "a b=m:f"],
)
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="write it as module:function or part=module:function"):
        load_reward(name)


@pytest.mark.parametrize(
    "suffix, message",
    [
        (":length", "the module has no function length"),
        (":SCALE", "the module has no function SCALE"),
        (":Reward", "the module has no function Reward"),
        (":takes_only_a_sample", r"called as takes_only_a_sample\(sample, completion\), but too many positional"),
        (":hypot", "called as hypot"),
        ("_absent:f", "there is no module .*_absent; .* PYTHONPATH"),
        ("_broken:f", "Traceback(.|\\n)*RuntimeError: no licence"),
    ],
)
def test_an_unusable_function_is_refused(my_rewards: str, suffix: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward(my_rewards + suffix)


@pytest.mark.parametrize(
    "function, completion, message",
    [
        ("brevity", "", r"sample clip-7: reward \w+:brevity raised an exception:\nTraceback(.|\n)*ZeroDivisionError"),
        ("returns_nothing", "x", r"sample clip-7: reward \w+:returns_nothing returned None, not a finite number"),
        ("a_pair", "x", r"sample clip-7: reward \w+:a_pair returned \(0.5, 'too long'\), not a finite number"),
        ("not_a_number", "x", r"sample clip-7: reward \w+:not_a_number returned nan, not a finite number"),
    ],
)
def test_a_failure_names_the_sample_and_is_not_scored_0(
    my_rewards: str, function: str, completion: str, message: str
) -> None:
    with pytest.raises(UserCodeError, match=message):
        load_reward(f"{my_rewards}:{function}")(sample("quality"), completion)
