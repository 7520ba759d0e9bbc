"""Contents of a packed microbatch, token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vcr1_kernels import SegmentLayout

from megatron_vcr1.data.encoding import EncodedPrompt
from megatron_vcr1.data.packing import Group
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.packed_batch import pack
from tests.model import tiny

CONFIG = ModelConfig.from_dict(tiny.hf_config("qwen2_5_vl").to_dict())


def _text_group(name: str, prompt: list[int], *responses: list[int]) -> Group:
    return Group(name, EncodedPrompt(torch.tensor(prompt), ()), tuple(torch.tensor(response) for response in responses))


def test_the_prompt_is_packed_once_and_last_response_tokens_are_not_inputs() -> None:
    batch = pack([_text_group("a", [5, 6, 7], [10, 11, 12], [20])], CONFIG)
    assert batch.token_ids.tolist() == [5, 6, 7, 10, 11]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert batch.layout == SegmentLayout((3, 2, 0), (-1, 0, 0))
    assert batch.predicting_token_indices.tolist() == [2, 3, 4, 2]
    assert batch.target_ids.tolist() == [10, 11, 12, 20]
    assert batch.response_lengths == (3, 1)


def test_groups_follow_each_other_and_each_starts_at_position_zero() -> None:
    batch = pack(
        [_text_group("a", [5, 6], [7, 8]), _text_group("b", [9], [3, 4], [2, 1])], CONFIG, pad_to_multiple_of=4
    )
    assert batch.token_ids.tolist() == [5, 6, 7, 9, 3, 2, 0, 0]  # two tokens of padding
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0, 1, 1, 0, 0]
    assert batch.layout == SegmentLayout((2, 1, 1, 1, 1, 2), (-1, 0, -1, 2, 2, -1))
    assert batch.predicting_token_indices.tolist() == [1, 2, 3, 4, 3, 5]


def test_response_positions_continue_from_the_prompts_largest_position() -> None:
    prompt = tiny.prompt("v", seed=0)
    batch = pack([Group("v", prompt, tiny.responses((4, 3), seed=1))], CONFIG)
    last = int(batch.position_ids[:, : len(prompt.token_ids)].max())
    assert (
        batch.position_ids[:, len(prompt.token_ids) :].tolist()
        == [[last + 1, last + 2, last + 3, last + 1, last + 2]] * 3
    )


def test_pad_ids_in_a_response_are_ordinary_tokens() -> None:
    prompt = tiny.prompt("iv", seed=0)
    response = torch.tensor([tiny.VIDEO_PAD, tiny.IMAGE_PAD, 3])
    batch = pack([_text_group("t", [1], [2, 3]), Group("iv", prompt, (response,))], CONFIG)
    is_pad = (prompt.token_ids == tiny.VIDEO_PAD) | (prompt.token_ids == tiny.IMAGE_PAD)
    assert batch.vision_token_indices.tolist() == (is_pad.nonzero()[:, 0] + 2).tolist()
    assert len(batch.vision) == 2


@pytest.mark.parametrize(
    "group, message",
    [
        (_text_group("empty-prompt", [], [1]), "sample empty-prompt: a prompt and each of its responses need at least"),
        (_text_group("empty-response", [1], [2], []), "sample empty-response: a prompt and each"),
        (_text_group("stray-pad", [1, tiny.VIDEO_PAD], [2]), "sample stray-pad: 1 vision pad tokens from token 1"),
    ],
)
def test_errors_name_the_sample(group: Group, message: str) -> None:
    with pytest.raises(ValueError) as error:
        pack([group], CONFIG)
    assert message in str(error.value)


def test_positions_beyond_the_range_of_the_model_are_refused() -> None:
    config = replace(CONFIG, text=replace(CONFIG.text, max_positions=6))
    pack([_text_group("fits", [5, 6, 7], [10, 11, 12, 13])], config)  # the last response token is not an input
    with pytest.raises(UserError, match=r"sample long: its rotary positions reach 6, but the model's range ends at 6"):
        pack([_text_group("long", [5, 6, 7], [10, 11, 12, 13, 14])], config)
