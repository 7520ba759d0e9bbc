from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_vcr1.config.layout import (
    ModelShape,
    check_batch_size,
    check_layout,
    layers_per_stage,
    possible_tensor_sizes,
)
from megatron_vcr1.config.model_sections import ParallelSection, RecomputeSection
from megatron_vcr1.config.training_sections import GrpoSection, TrainSection
from megatron_vcr1.errors import UserError


def shape(num_layers, heads, kv_heads, ffn, vocab, vision_heads, vision_ffn):
    return ModelShape(num_layers, heads, kv_heads, ffn, vocab, vision_heads, vision_ffn)


# Sizes in the published config.json files.
QWEN25_3B = shape(36, 16, 2, 11008, 151936, 16, 3420)
QWEN25_7B = shape(28, 28, 4, 18944, 152064, 16, 3420)
QWEN25_72B = shape(80, 64, 8, 29568, 152064, 16, 3456)
QWEN2_2B = shape(28, 12, 2, 8960, 151936, 16, 5120)


def problems(model=QWEN25_7B, world_size=8, recompute=None, **parallel) -> list[str]:
    try:
        check_layout(model, ParallelSection(**parallel), recompute or RecomputeSection(), world_size)
    except UserError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize(
    "model, sizes",
    [
        (QWEN25_3B, [1, 2, 4]),  # 3420 vision features are not divisible by 8
        (QWEN25_7B, [1, 2, 4]),
        (QWEN25_72B, [1, 2, 4, 8, 16]),  # 16 vision heads are not divisible by 32
        (QWEN2_2B, [1, 2, 4]),  # 12 heads are not divisible by 8
    ],
)
def test_possible_tensor_sizes_of_published_models(model, sizes):
    assert possible_tensor_sizes(model) == sizes


@pytest.mark.parametrize(
    "model, parallel",
    [
        (QWEN25_7B, {}),
        (QWEN25_7B, {"tensor": 4, "pipeline": 2, "sequence_parallel": True}),
        (QWEN25_3B, {"tensor": 4}),  # 2 key-value heads, each on two ranks
        (QWEN25_7B, {"tensor": 1, "pipeline": 8, "first_stage_layers": 2, "last_stage_layers": 2}),
    ],
)
def test_possible_layouts_are_accepted(model, parallel):
    assert problems(model, **parallel) == []


@pytest.mark.parametrize(
    "field, name",
    [
        ("num_heads", "attention heads"),
        ("ffn_hidden_size", "FFN features"),
        ("vocab_size", "vocabulary entries"),
        ("vision_num_heads", "vision heads"),
        ("vision_ffn_hidden_size", "vision FFN features"),
        ("num_experts", "experts"),
    ],
)
def test_each_indivisible_size_is_named(field, name):
    sizes = dict.fromkeys(ModelShape.__dataclass_fields__, 64) | {field: 61}
    (problem,) = problems(ModelShape(**sizes), tensor=2)
    assert problem == f"parallel.tensor = 2 does not divide 61 {name}; it can be 1"


def test_key_value_heads_are_sharded_or_replicated():
    model = shape(4, 24, 6, 24, 24, 24, 24)
    assert problems(model, tensor=12, world_size=12) == problems(model, tensor=3, world_size=3) == []
    (problem,) = problems(model, tensor=4)
    assert problem == "parallel.tensor = 4 does not divide 6 key-value heads; it can be 1, 2, 3, 6, 12, 24"


def test_all_problems_are_reported_at_once_with_a_solution():
    assert problems(QWEN25_7B, world_size=6, tensor=8, pipeline=3) == [
        "parallel.tensor = 8 does not divide 28 attention heads nor 3420 vision FFN features; it can be 1, 2, 4",
        "parallel.pipeline = 3: 28 layers (first stage: an equal share, last stage: an equal share) cannot be split "
        "into 3 stages; set parallel.first_stage_layers = 8 alone, which leaves 10 layers to each other stage",
        "6 ranks cannot be split into replicas of parallel.tensor * parallel.pipeline = 24 ranks; "
        "launch a multiple of 24, or lower parallel.tensor or parallel.pipeline",
    ]


def test_recomputed_blocks_must_divide_every_stage():
    layout = {"pipeline": 2, "first_stage_layers": 12}  # 12 and 16 layers
    assert problems(recompute=RecomputeSection(granularity="full", num_layers=4), **layout) == []
    (problem,) = problems(recompute=RecomputeSection(granularity="full", num_layers=3), **layout)
    assert problem.startswith(
        "recompute.num_layers = 3 does not divide the number of layers of every pipeline stage (12, 16)"
    )
    assert problems(recompute=RecomputeSection(granularity="selective", num_layers=3), **layout) == []


@pytest.mark.parametrize(
    "num_layers, parallel, advice",
    [
        (28, {"first_stage_layers": 4}, "unset them"),
        (28, {"pipeline": 2, "first_stage_layers": 28}, "unset both for 14 layers on each"),
        (28, {"pipeline": 2, "first_stage_layers": 4, "last_stage_layers": 4}, "unset both for 14"),
        (5, {"pipeline": 4}, "first_stage_layers = 2 alone, which leaves 1 layers"),
        (2, {"pipeline": 4}, "at most 2"),
    ],
)
def test_impossible_stages_are_refused_with_advice(num_layers, parallel, advice):
    with pytest.raises(UserError, match=advice):
        layers_per_stage(num_layers, ParallelSection(**parallel))


@pytest.mark.parametrize("first, last", [(None, None), (6, None), (None, 3), (2, 6), (1, 1), (11, None)])
@pytest.mark.parametrize("pipeline", [2, 3, 4])
def test_stages_match_megatron_core(first, last, pipeline):
    """megatron-core splits 12 layers as `layers_per_stage` does; where it would silently drop layers, we refuse."""
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    config = SimpleNamespace(
        num_layers=12,
        pipeline_model_parallel_size=pipeline,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
        virtual_pipeline_model_parallel_size=None,
        pipeline_model_parallel_layout=None,
        account_for_embedding_in_pipeline_split=False,
        account_for_loss_in_pipeline_split=False,
    )
    parallel = ParallelSection(pipeline=pipeline, first_stage_layers=first, last_stage_layers=last)
    try:
        expected = tuple(get_num_layers_to_build(config, pp_rank=rank) for rank in range(pipeline))
    except AssertionError:
        expected = ()
    if sum(expected) == 12 and min(expected) > 0:
        assert layers_per_stage(12, parallel) == expected
    else:
        with pytest.raises(UserError, match="cannot be split"):
            layers_per_stage(12, parallel)


def test_prompts_must_split_over_replicas_and_minibatches() -> None:
    train = TrainSection(prompts_per_step=6)
    check_batch_size(train, GrpoSection(num_minibatches=3), num_replicas=2)
    with pytest.raises(UserError, match=r"prompts_per_step = 6 cannot be split evenly over 4 .*multiple of 4"):
        check_batch_size(train, GrpoSection(), num_replicas=4)
    with pytest.raises(UserError, match=r"prompts_per_step = 6 is not a multiple of grpo\.num_minibatches = 4"):
        check_batch_size(train, GrpoSection(num_minibatches=4), num_replicas=2)
    check_batch_size(TrainSection(stage="sft", prompts_per_step=6), GrpoSection(num_minibatches=4), num_replicas=2)
