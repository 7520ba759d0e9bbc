"""Sizes of a job and its layout."""

from __future__ import annotations

import pytest

from megatron_vcr1.model.presets import model_config
from megatron_vcr1.planning.job import Job, Layout, square_video


def test_the_video_fills_the_prompt() -> None:
    config = model_config("qwen2.5-vl-7b")
    assert square_video(config, 1024) == (15, 16, 16)
    assert square_video(config, 3840) == (19, 28, 28)
    assert square_video(model_config("qwen3-vl-8b"), 3840) == (18, 28, 28)  # with time stamps
    with pytest.raises(ValueError, match="at least 128"):
        square_video(config, 100)


def test_a_group_counts_its_prompt_once() -> None:
    job = Job(model_config("qwen2.5-vl-7b"), prompt_tokens=1024, group_size=4, response_tokens=11)
    assert job.group_tokens == job.groups(1).tokens == 1024 + 4 * 10
    assert job.groups(3).targets == 3 * 4 * 11
    assert job.frames_per_prompt == 30


def test_layers_and_microbatches_of_a_layout() -> None:
    job = Job(model_config("qwen2.5-vl-7b"), prompts_per_step=16)
    layout = Layout(tensor=2, pipeline=4, replicas=2, first_stage_layers=4, groups_per_microbatch=3)
    assert layout.num_gpus == 16 and layout.name == "2 x 4 x 2"
    assert layout.stages(job.config) == (4, 8, 8, 8)
    assert layout.num_microbatches(job) == 3  # 8 groups per replica
