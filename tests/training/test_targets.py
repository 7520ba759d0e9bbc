from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_vcr1.config.data_sections import DataSource
from megatron_vcr1.data.templates import load_templates
from megatron_vcr1.errors import UserError
from megatron_vcr1.rewards import score
from megatron_vcr1.tasks import task_names
from megatron_vcr1.training.targets import TargetEncoder, check_thinking, completion_text
from tests.data.tiny_processor import tiny_processor
from tests.rewards.samples import sample


@pytest.mark.parametrize("task", [task for task in task_names() if task != "captioning"])
@pytest.mark.parametrize("thinking", [False, True])
def test_sft_targets_earn_the_full_reward(task: str, thinking: bool) -> None:
    target = replace(sample(task), thinking="The red car passes first.")
    reward = score(target, completion_text(target, load_templates(), thinking=thinking), thinking=thinking)
    assert reward.total == pytest.approx(3 if task == "grounded_qa" else 2, abs=0.03)  # the answer's times are rounded
    assert not reward.reasons


def test_targets_end_with_the_end_of_turn_token() -> None:
    processor = tiny_processor()
    targets = TargetEncoder(processor)
    token_ids = targets.encode("<answer>B</answer>")
    assert processor.decode(token_ids[:-1], skip_special_tokens=False).replace(" ", "") == "<answer>B</answer>"
    assert processor.decode(token_ids[-1:], skip_special_tokens=False) == "<|im_end|>"


def test_chat_template_that_never_ends_a_turn_is_refused() -> None:
    processor = tiny_processor()
    endless = replace(processor, chat_template=processor.chat_template.replace("<|im_end|>", ""))
    with pytest.raises(UserError, match="does not close the assistant's turn"):
        TargetEncoder(endless)


def test_thinking_sources_need_samples_with_reasoning() -> None:
    source = DataSource.model_validate({"manifest": "train.jsonl"})
    with_thinking = replace(sample("quality"), thinking="because")
    check_thinking([source], [[with_thinking]])
    with pytest.raises(UserError, match=r"1 of 2 samples have no 'thinking'.*the first is clip-7"):
        check_thinking([source], [[with_thinking, sample("quality")]])
    check_thinking([source.model_copy(update={"thinking": False})], [[sample("quality")]])
