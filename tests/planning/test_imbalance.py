from __future__ import annotations

import pytest

from megatron_vcr1.model.presets import model_config
from megatron_vcr1.planning.imbalance import work_imbalance
from megatron_vcr1.planning.job import Job


def _job(prompts: int = 8, response_tokens: int = 200) -> Job:
    config = model_config("qwen2.5-vl-7b")
    return Job(config, prompts_per_step=prompts, response_tokens=response_tokens, prompt_tokens=1024)


def test_replicas_with_one_group_each_wait_for_the_longest_one() -> None:
    one, many = work_imbalance(_job(), 8, 1000), work_imbalance(_job(prompts=64), 8, 1000)
    assert one > 1.2
    assert 1 < many < 1 + (one - 1) / 10  # with several groups each, dealing by FLOPs evens them out


@pytest.mark.parametrize(("replicas", "longest"), [(1, 1000), (8, 200)], ids=["one replica", "equal lengths"])
def test_equal_work_has_no_imbalance(replicas: int, longest: int) -> None:
    assert work_imbalance(_job(), replicas, longest) == 1
