"""Our FLOP counts against PyTorch's counter, on our model and on transformers'."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.config.model_sections import RecomputeSection
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.families.qwen2_5_vl.tower import window_order
from megatron_vcr1.model.flops import (
    Flops,
    Workload,
    bf16_peak,
    forward_flops,
    recomputed_flops,
    training_flops,
)
from megatron_vcr1.model.packed_batch import PackedBatch, pack
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh
from tests.model import tiny

pytestmark = pytest.mark.xdist_group("gloo")

aten = torch.ops.aten


def _pairs(query: torch.Size, key: torch.Size, is_causal: bool) -> int:
    """Count the multiplications of one of attention's two matmuls, for inputs [batch, heads, length, head_dim].

    Causal attention requires queries and keys of the same length.
    """
    batch, heads, length, head_dim = query
    pairs = length * (length + 1) // 2 if is_causal else length * key[2]
    return batch * heads * head_dim * pairs


def _attention(query, key, value, dropout=0.0, is_causal=False, **kwargs) -> int:
    return 4 * _pairs(query, key, is_causal)


def _attention_backward(grad, query, key, value, out, lse, dropout, is_causal, **kwargs) -> int:
    return 8 * _pairs(query, key, is_causal)


def _grouped_matmul(left, right, *args, out_shape, **kwargs) -> int:
    """Count a grouped matmul of rows [rows, k] by group, or of two matrices whose inner dimension is in groups."""
    is_weight_gradient = len(right) == 2
    return 2 * math.prod(left) * right[-1] if is_weight_gradient else 2 * math.prod(left) * out_shape[-1]


COUNTED = {  # PyTorch's counter has no entries for the CPU's attention
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._grouped_mm: _grouped_matmul,
}


def _rotary(config: ModelConfig, num_tokens: int) -> int:
    """Count the matmuls by which transformers computes rotary angles on three axes. Our counts leave them out."""
    return 2 * 3 * num_tokens * config.text.head_dim // 2


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=COUNTED)


def _batch(config: ModelConfig) -> PackedBatch:
    first, second = (
        tiny.prompt(kinds, seed, timestamps=config.media.timestamps_as_text) for kinds, seed in (("iv", 1), ("vv", 3))
    )
    samples = [
        Group("a", first, tiny.responses((5, 1, 3, 8), seed=2)),
        Group("b", second, tiny.responses((2, 7), seed=4)),
    ]
    return pack(samples, config)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny.create(request.param, folder)
    return folder


def _counted(folder: Path, **settings: object) -> tuple[int, int, ModelConfig, PackedBatch]:
    """Count the operations of our model's forward and backward passes with PyTorch's counter."""
    run = RunConfig.model_validate(
        {"model": {"path": folder, "dtype": "float32", **settings.pop("model", {})}, **settings}
    )
    config = ModelConfig.from_pretrained(folder)
    with mesh.world(run.parallel):
        model = build_model(config, run.model, run.parallel, run.recompute).train()
        load_model_weights(model, folder)
        batch = _batch(config)
        with _counter() as forward:
            loss = model.logits(model(batch)).logsumexp(-1).sum()
        with _counter() as backward:
            loss.backward()
    return forward.get_total_flops(), backward.get_total_flops(), config, batch


@pytest.mark.parametrize(
    "freeze", [(), ("vision_tower",), ("merger",), ("vision_tower", "merger"), ("language_model",)], ids=" ".join
)
def test_forward_and_training_flops_equal_pytorchs_count(model_dir: Path, freeze: tuple[str, ...]) -> None:
    forward, backward, config, batch = _counted(model_dir, model={"freeze": freeze})
    work = Workload.of_batch(config, batch)
    assert forward_flops(config, work).total == forward
    assert training_flops(config, work, freeze=freeze).total == forward + backward


@pytest.mark.parametrize(
    "recompute",
    [
        {"granularity": "full"},
        {"granularity": "selective", "modules": ["core_attn"]},
        {"granularity": "selective", "modules": ["core_attn", "mlp"]},
    ],
    ids=str,
)
def test_recomputed_flops_equal_pytorchs_additional_count(model_dir: Path, recompute: dict[str, object]) -> None:
    forward, backward, config, batch = _counted(model_dir, recompute=recompute)
    work = Workload.of_batch(config, batch)
    recomputed = recomputed_flops(config, work, RecomputeSection.model_validate(recompute))
    assert training_flops(config, work).total + recomputed.total == forward + backward


def test_forward_flops_equal_those_of_transformers_with_full_squares(model_dir: Path) -> None:
    """transformers' eager attention computes the masked pairs too; everything else is the same."""
    import transformers

    kind = transformers.AutoModelForImageTextToText
    model = kind.from_pretrained(model_dir, attn_implementation="eager")
    config = ModelConfig.from_pretrained(model_dir)
    prompt, response = (
        tiny.prompt("v", seed=5, timestamps=config.media.timestamps_as_text),
        tiny.responses((6,), seed=6)[0],
    )
    with torch.no_grad(), _counter() as counter:
        tiny.transformers_logits(model, config, prompt, response)
    (item,) = prompt.vision
    num_tokens = len(prompt.token_ids) + len(response)
    work = Workload.of_group(config, num_tokens, [], [item.grid_thw])
    square = replace(work, text_pairs=num_tokens**2, targets=num_tokens)
    # transformers computed the rotary angles with a matmul; since 5.24 it multiplies elementwise.
    assert counter.get_total_flops() - forward_flops(config, square).total in (0, _rotary(config, num_tokens))


def test_window_pairs_are_the_sum_of_the_windows_squares() -> None:
    config = ModelConfig.from_dict(tiny.hf_config("qwen2_5_vl").to_dict())
    for grid in ((1, 4, 4), (3, 6, 10), (2, 14, 2)):
        _, lengths = window_order(grid, config.vision)
        windowed = sum(length**2 for length in lengths)
        full = grid[0] * (grid[1] * grid[2]) ** 2
        # One of the three layers has full attention.
        assert Workload.of_group(config, 1, (), [grid]).vision_pairs == 2 * windowed + full


def test_a_group_is_counted_as_it_is_packed() -> None:
    config = ModelConfig.from_dict(tiny.hf_config("qwen2_5_vl").to_dict())
    prompt, responses = tiny.prompt("iv", seed=1), tiny.responses((5, 1, 3, 8), seed=2)
    lengths = [len(response) for response in responses]
    grids = [item.grid_thw for item in prompt.vision]
    of_group = Workload.of_group(config, len(prompt.token_ids), lengths, grids)
    assert of_group == Workload.of_batch(config, pack([Group("a", prompt, responses)], config))
    separate = sum((Workload.of_group(config, len(prompt.token_ids), [n], grids) for n in lengths), Workload())
    assert separate.patches == 4 * of_group.patches and separate.targets == of_group.targets
    assert separate.tokens == of_group.tokens + 3 * len(prompt.token_ids)


def test_the_rule_of_thumb_holds_for_seven_billion() -> None:
    """Training takes six operations per parameter and token, without attention and the embedding table."""
    config = ModelConfig.from_dict(
        {
            "model_type": "qwen2_5_vl",
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
        }
    )
    flops = training_flops(config, Workload(tokens=1000, targets=1000)).total
    assert flops / (6 * 7_615_616_512 * 1000) == pytest.approx(1 - 152064 * 3584 / 7_615_616_512, rel=1e-4)


def test_flops_add_up_by_part() -> None:
    total = Flops(head=1, text_layers=2) + Flops(head=3, merger=4)
    assert total == Flops(head=4, text_layers=2, merger=4)
    assert total.total == 10 and total.vision == 4


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("a toaster", None),
    ],
)
def test_peaks_by_device_name(name: str, peak: float | None) -> None:
    assert bf16_peak(name) == peak
