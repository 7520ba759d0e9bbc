"""A layer's experts against those of transformers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

from megatron_vcr1.config.model_sections import ParallelSection, RecomputeSection
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.experts import MixtureOfExperts
from megatron_vcr1.model.transformer_config import text_transformer_config
from megatron_vcr1.parallel import mesh
from tests.model import tiny

HF_CONFIG = tiny.hf_config("qwen3_vl_moe")
TEXT = ModelConfig.from_dict(HF_CONFIG.to_dict()).text


@pytest.fixture
def world() -> Iterator[None]:
    with mesh.world(ParallelSection()):
        yield


@pytest.mark.parametrize("num_tokens", [50, 1, 0])
def test_outputs_and_gradients_equal_those_of_transformers(world: None, num_tokens: int) -> None:
    """One token leaves two experts without any; their gradients are zeros, not None."""
    torch.manual_seed(0)
    config = text_transformer_config(
        TEXT, ParallelSection(), RecomputeSection(), dtype=torch.float32, fp8=None, initialize_weights=True
    )
    assert TEXT.experts is not None
    ours = MixtureOfExperts(config, experts=TEXT.experts)
    theirs = Qwen3VLMoeTextSparseMoeBlock(HF_CONFIG.get_text_config())
    pairs = [
        (ours.router.weight, theirs.gate.weight),
        (ours.experts.linear_fc1.weight, theirs.experts.gate_up_proj),
        (ours.experts.linear_fc2.weight, theirs.experts.down_proj),
    ]
    with torch.no_grad():
        for weight, same in pairs:
            same.copy_(weight)
    hidden = torch.randn(num_tokens, 1, TEXT.hidden_size, requires_grad=True)
    same_hidden = hidden.detach().clone().requires_grad_()
    output, bias = ours(hidden)
    expected = theirs(same_hidden)
    assert bias is None
    torch.testing.assert_close(output, expected)
    (output * torch.linspace(-1, 1, TEXT.hidden_size)).sum().backward()
    if num_tokens:  # otherwise transformers' result does not depend on its weights
        (expected * torch.linspace(-1, 1, TEXT.hidden_size)).sum().backward()
    for weight, same in [*pairs, (hidden, same_hidden)]:
        gradient = torch.zeros_like(same) if same.grad is None else same.grad
        torch.testing.assert_close(weight.grad, gradient)
