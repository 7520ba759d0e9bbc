"""mRoPE positions and rotary angles.

Positions are compared with examples computed by hand, and with transformers where its rule is the same. Angles are
compared with float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

from megatron_vcr1.data.encoding import EncodedPrompt, VisionInput
from megatron_vcr1.model.attention import RotaryTables
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.mrope import prompt_positions, rotary_angles, vision_positions
from megatron_vcr1.model.presets import raw_config
from tests.model import tiny
from tests.model.tiny import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START


def _positions(token_ids: list[int], vision: list[tuple[tuple[int, int, int], float | None]]) -> Tensor:
    config = ModelConfig.from_dict(tiny.hf_config("qwen2_5_vl").to_dict())
    inputs = tuple(VisionInput(torch.empty(0), grid, seconds) for grid, seconds in vision)
    return prompt_positions(config, EncodedPrompt(torch.tensor(token_ids), inputs))


def test_text_advances_all_axes_together() -> None:
    assert _positions([5, 6, 7], []).tolist() == [[0, 1, 2]] * 3
    assert _positions([], []).shape == (3, 0)


def test_video_time_follows_seconds_and_text_continues_after_the_largest_position() -> None:
    # Two steps of 1 x 2 tokens, 2.5 s apart, after two tokens of text: time is 2 and 2 + 5, and text continues at 8.
    token_ids = [7, VISION_START, *[VIDEO_PAD] * 4, VISION_END, 8]
    assert _positions(token_ids, [((2, 2, 4), 2.5)]).tolist() == [
        [0, 1, 2, 2, 7, 7, 8, 9],
        [0, 1, 2, 2, 2, 2, 8, 9],
        [0, 1, 2, 3, 2, 3, 8, 9],
    ]


def test_time_is_multiplied_before_it_is_truncated() -> None:
    time = vision_positions((4, 2, 2), 0.4, merge_size=2, tokens_per_second=2)[0]
    assert time.tolist() == [0, 0, 1, 2]  # 0, 0.8, 1.6, 2.4 and not multiples of a truncated 0.8


def test_qwen2_vl_counts_temporal_patches_regardless_of_their_duration() -> None:
    time = vision_positions((3, 2, 2), 2.5, merge_size=2, tokens_per_second=None)[0]
    assert time.tolist() == [0, 1, 2]


def test_long_video_with_real_float_steps_matches_float32_arithmetic() -> None:
    seconds = 2 / 29.97
    time = vision_positions((384, 2, 2), seconds, merge_size=2, tokens_per_second=2)[0]
    assert time.tolist() == ((torch.arange(384).float() * seconds).float() * 2).floor().long().tolist()


def _transformers_positions(token_ids: Tensor, grids: list[tuple[int, int, int]], seconds: list[float]) -> Tensor:
    stand_in = type("Model", (), {})()  # get_rope_index uses only the model's configuration
    stand_in.config = tiny.hf_config("qwen2_5_vl")
    stand_in.get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids.__get__(stand_in)
    types = torch.zeros_like(token_ids)
    types[token_ids == VIDEO_PAD] = 2
    positions, _ = Qwen2_5_VLModel.get_rope_index(
        stand_in,
        token_ids[None],
        mm_token_type_ids=types[None],
        video_grid_thw=torch.tensor(grids),
        second_per_grid_ts=torch.tensor(seconds),
    )
    return positions[:, 0]


@pytest.mark.parametrize("num_steps, same", [(2, True), (9, False)])
def test_transformers_5_agrees_until_time_outgrows_space(num_steps: int, same: bool) -> None:
    """Pins a deviation of transformers from the published models; delete this test when a release fixes it."""
    grid, seconds = (num_steps, 4, 10), 1.0
    token_ids = torch.tensor([3, VISION_START, *[VIDEO_PAD] * (num_steps * 10), VISION_END, 4, 5])
    ours = _positions(token_ids.tolist(), [(grid, seconds)])
    theirs = _transformers_positions(token_ids, [grid], [seconds])
    vision = token_ids == VIDEO_PAD
    assert torch.equal(ours[:, vision], theirs[:, vision])
    assert torch.equal(ours, theirs) is same


@pytest.mark.parametrize(
    "token_ids, vision, message",
    [
        ([1, VIDEO_PAD, VIDEO_PAD, 2], [((1, 2, 2), 1.0)], "1 vision pad tokens from token 2 on belong to no"),
        ([1, VIDEO_PAD, 2], [((1, 2, 4), 1.0)], "vision input 0 has a grid of (1, 2, 4) and needs 2 pad tokens"),
        ([1, 2], [((1, 2, 2), None)], "vision input 0"),
        ([1, IMAGE_PAD, 2], [], "belong to no image or video"),
    ],
)
def test_pads_that_do_not_match_the_grids_are_errors(token_ids: list[int], vision: list, message: str) -> None:
    with pytest.raises(ValueError) as error:
        _positions(token_ids, vision)
    assert message in str(error.value)


class _Tf32Matmuls(TorchDispatchMode):
    """Emulates TF32: matmuls round their float32 inputs to 11 bits of mantissa, as a GPU does where TF32 is allowed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
            args = tuple(self._rounded(x) for x in args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _rounded(x: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


def test_angles_of_long_videos_are_exact_where_matmuls_use_tf32() -> None:
    positions = torch.tensor([[4099, 30_001], [2049, 7], [5001, 12_345]])
    axes = [0] * 16 + [1] * 24 + [2] * 24  # axes and base of the published models
    with _Tf32Matmuls():
        assert float(torch.tensor([[4099.0]]) @ torch.ones(1, 1)) == 4100
        angles = rotary_angles(positions, axes, 1e6)
    exact = positions.double()[torch.tensor(axes)].T / 1e6 ** (torch.arange(64).double() / 64)
    torch.testing.assert_close(angles.double(), exact.repeat(1, 2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{}, {"beta_fast": 20, "beta_slow": 2}])
def test_yarn_equals_transformers(options: dict[str, float]) -> None:
    """The parameters of the published Qwen2.5-VL model cards."""
    rope = {"type": "yarn", "mrope_section": [16, 24, 24], "factor": 4, "original_max_position_embeddings": 32768}
    raw = raw_config("qwen2.5-vl-7b") | {"max_position_embeddings": 32768, "rope_scaling": rope | options}
    text = ModelConfig.from_dict(raw).text
    assert text.yarn is not None and text.max_positions == 131_072
    theirs = transformers.Qwen2_5_VLTextConfig(
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_heads,
        rope_parameters={**rope, **options, "rope_type": "yarn", "rope_theta": 1e6},
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs)
    angles = rotary_angles(torch.full((3, 1), 1), text.mrope_axes, text.rope_theta, text.yarn)[0]
    torch.testing.assert_close(angles, frequencies.repeat(2), rtol=1e-6, atol=0)
    assert text.yarn.attention_factor == pytest.approx(factor)
    tables = RotaryTables.from_angles(angles, text.yarn.attention_factor)
    torch.testing.assert_close(tables.cos, angles.cos() * factor)
    torch.testing.assert_close(tables.sin, angles.sin() * factor)


def test_yarn_with_interleaved_axes_equals_transformers() -> None:
    rope = {"mrope_section": [24, 20, 20], "mrope_interleaved": True}
    rope |= {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 262_144}
    raw = raw_config("qwen3-vl-8b")
    raw["text_config"] = raw["text_config"] | {"rope_scaling": rope}
    text = ModelConfig.from_dict(raw).text
    assert text.yarn is not None and text.max_positions == 524_288
    theirs = transformers.Qwen3VLTextConfig(head_dim=128, rope_parameters={**rope, "rope_theta": text.rope_theta})
    positions = torch.tensor([[4099, 30_001], [2049, 7], [501, 1_234]])
    cos, sin = Qwen3VLTextRotaryEmbedding(theirs)(torch.zeros(1), positions[:, None])
    angles = rotary_angles(positions, text.mrope_axes, text.rope_theta, text.yarn)
    tables = RotaryTables.from_angles(angles, text.yarn.attention_factor)
    torch.testing.assert_close(tables.cos, cos[0], rtol=0, atol=5e-3)  # theirs are in float32, at large angles
    torch.testing.assert_close(tables.sin, sin[0], rtol=0, atol=5e-3)
