from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_vcr1.config.layout import ModelShape, check_layout, fitting_tensor_sizes, layers_per_stage
from megatron_vcr1.config.schema import ParallelSection, RecomputeSection
from megatron_vcr1.errors import UserError


def shape(num_layers, heads, kv_heads, ffn, vocab, vision_heads, vision_ffn):
    return ModelShape(num_layers, heads, kv_heads, ffn, vocab, vision_heads, vision_ffn)


# Numbers of the published config.json files.
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
        (QWEN25_3B, [1, 2, 4]),  # 8 would cut 3420 vision features
        (QWEN25_7B, [1, 2, 4]),
        (QWEN25_72B, [1, 2, 4, 8, 16]),  # 32 would cut 16 vision heads
        (QWEN2_2B, [1, 2, 4]),  # 8 would cut 12 heads
    ],
)
def test_tensor_sizes_of_published_models(model, sizes):
    assert fitting_tensor_sizes(model) == sizes


@pytest.mark.parametrize(
    "model, parallel",
    [
        (QWEN25_7B, {}),
        (QWEN25_7B, {"tensor": 4, "pipeline": 2, "sequence_parallel": True}),
        (QWEN25_3B, {"tensor": 4}),  # 2 key-value heads, each on two ranks
        (QWEN25_7B, {"tensor": 1, "pipeline": 8, "first_stage_layers": 2, "last_stage_layers": 2}),
    ],
)
def test_possible_layouts(model, parallel):
    assert problems(model, **parallel) == []


@pytest.mark.parametrize(
    "field, name",
    [
        ("num_heads", "attention heads"),
        ("ffn_hidden_size", "FFN features"),
        ("vocab_size", "vocabulary entries"),
        ("vision_num_heads", "vision heads"),
        ("vision_ffn_hidden_size", "vision FFN features"),
    ],
)
def test_each_indivisible_number_is_named(field, name):
    numbers = dict.fromkeys(ModelShape.__dataclass_fields__, 64) | {field: 61}
    (problem,) = problems(ModelShape(**numbers), tensor=2)
    assert problem == f"parallel.tensor = 2 does not divide 61 {name}; it can be 1"


def test_key_value_heads_are_divided_or_replicated_whole():
    model = shape(4, 24, 6, 24, 24, 24, 24)
    assert problems(model, tensor=12, world_size=12) == problems(model, tensor=3, world_size=3) == []
    (problem,) = problems(model, tensor=4)
    assert problem == "parallel.tensor = 4 does not divide 6 key-value heads; it can be 1, 2, 3, 6, 12, 24"


def test_all_problems_at_once_with_a_way_out():
    assert problems(QWEN25_7B, world_size=6, tensor=8, pipeline=3) == [
        "parallel.tensor = 8 does not divide 28 attention heads nor 3420 vision FFN features; it can be 1, 2, 4",
        "parallel.pipeline: 28 layers, first stage even, last stage even, do not make 3 stages; "
        "parallel.first_stage_layers = 8 alone would leave 10 to each other stage",
        "6 ranks do not divide into copies of parallel.tensor * parallel.pipeline = 24; "
        "launch a multiple of 24, or lower one of the two",
    ]


def test_full_recompute_in_units_that_divide_every_stage():
    layout = {"pipeline": 2, "first_stage_layers": 12}  # 12 and 16 layers
    assert problems(recompute=RecomputeSection(granularity="full", num_layers=4), **layout) == []
    (problem,) = problems(recompute=RecomputeSection(granularity="full", num_layers=3), **layout)
    assert problem.startswith("recompute.num_layers = 3 does not divide the layers of every pipeline stage (12, 16)")
    assert problems(recompute=RecomputeSection(granularity="selective", num_layers=3), **layout) == []


@pytest.mark.parametrize(
    "num_layers, parallel, advice",
    [
        (28, {"first_stage_layers": 4}, "unset them"),
        (28, {"pipeline": 2, "first_stage_layers": 28}, "unset both for 14 layers on each"),
        (28, {"pipeline": 2, "first_stage_layers": 4, "last_stage_layers": 4}, "unset both for 14"),
        (5, {"pipeline": 4}, "first_stage_layers = 2 alone would leave 1"),
        (2, {"pipeline": 4}, "at most 2"),
    ],
)
def test_impossible_stages(num_layers, parallel, advice):
    with pytest.raises(UserError, match=advice):
        layers_per_stage(num_layers, ParallelSection(**parallel))


@pytest.mark.parametrize("first, last", [(None, None), (6, None), (None, 3), (2, 6), (1, 1), (11, None)])
@pytest.mark.parametrize("pipeline", [2, 3, 4])
def test_stages_are_megatron_cores(first, last, pipeline):
    """megatron-core divides 12 layers as `layers_per_stage` does; where it would lose some silently, we refuse."""
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
        with pytest.raises(UserError, match="do not make"):
            layers_per_stage(12, parallel)
