"""The arguments that flash-attn receives for a layout, checked with a fake that follows its documentation.

The library itself needs a GPU.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from vcr1_kernels import SegmentLayout, reference, shared_prefix_attention
from vcr1_kernels.ops.flash_attn import flash_attention, flash_attn_is_installed, use_flash_attn


def _fake_varlen_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
) -> Tensor:
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q == int(cu_seqlens_q.diff().max()) and max_seqlen_k == int(cu_seqlens_k.diff().max())
    outputs = []
    for start, end in zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False):
        heads_first = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
        output = F.scaled_dot_product_attention(*heads_first, is_causal=causal, scale=softmax_scale, enable_gqa=True)
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def fake_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = _fake_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.mark.parametrize("causal", [True, False])
def test_independent_segments_are_passed_as_sequences(fake_flash_attn: None, causal: bool) -> None:
    layout = SegmentLayout.packed((5, 1, 0, 9), causal=causal)
    query, key, value = (torch.randn(15, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    torch.testing.assert_close(
        flash_attention(query, key, value, layout, 0.3),
        reference.shared_prefix_attention(query, key, value, layout, scale=0.3),
    )


def test_prompts_with_one_response_use_flash_attn(fake_flash_attn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """In supervised fine-tuning no prefix is shared: a prompt and its only response are one sequence."""
    layouts: list[SegmentLayout] = []

    def use_flash_attn_as_on_gpu(query: Tensor, layout: SegmentLayout) -> bool:
        layouts.append(layout)
        return max(layout.prefixes) < 0

    monkeypatch.setattr("vcr1_kernels.ops.attention.use_flash_attn", use_flash_attn_as_on_gpu)
    layout = SegmentLayout((5, 3, 4, 0), (-1, 0, -1, 2))
    inputs = [torch.randn(12, heads, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    torch.testing.assert_close(
        shared_prefix_attention(*inputs, layout), reference.shared_prefix_attention(*inputs, layout)
    )
    assert layouts == [SegmentLayout.packed((8, 4))]


def test_flash_attn_is_not_used_on_the_cpu() -> None:
    query = torch.randn(3, 2, 8, dtype=torch.bfloat16)
    assert not use_flash_attn(query, SegmentLayout.packed((3,)))


@pytest.mark.skipif(flash_attn_is_installed(), reason="flash-attn is installed")
def test_flash_attn_4_does_not_count_as_flash_attn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn-4 is installed with SGLang; its folder flash_attn has no flash_attn_varlen_func."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert not flash_attn_is_installed.__wrapped__()
    (tmp_path / "flash_attn" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert flash_attn_is_installed.__wrapped__()
