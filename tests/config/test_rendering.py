from __future__ import annotations

import tomllib

import pytest

from megatron_vcr1.config.data_sections import DataSection, DataSource
from megatron_vcr1.config.evaluation_sections import BenchmarkSource, EvaluateSection
from megatron_vcr1.config.loading import load_config
from megatron_vcr1.config.model_sections import ModelSection, ParallelSection, RecomputeSection
from megatron_vcr1.config.rendering import LINE_WIDTH, default_config, render_toml
from megatron_vcr1.config.schema import RunConfig, entry_class
from megatron_vcr1.config.training_sections import RewardsSection

CUSTOM = RunConfig(
    model=ModelSection(path='mödels/a "quoted" \\ name', layer_spec="local", freeze=("vision_tower", "merger")),
    parallel=ParallelSection(tensor=2, pipeline=3, sequence_parallel=True, first_stage_layers=2),
    recompute=RecomputeSection(granularity="selective", modules=("mlp", "core_attn")),
    data=DataSection(
        python_path="mine",
        tasks=("mine.counting",),
        sources=(DataSource(manifest="a.jsonl", weight=0.5, rewards=("mine:f",)), DataSource(manifest="b")),
    ),
    rewards=RewardsSection(weights={"iou": 2.0, "mine:f": -0.5}),
    evaluate=EvaluateSection(benchmarks=(BenchmarkSource(name="charades_sta", manifest="t.jsonl"),)),
)


@pytest.mark.parametrize("config", [default_config(), CUSTOM])
@pytest.mark.parametrize("documented", [True, False])
def test_rendered_toml_loads_to_an_equal_config(tmp_path, config, documented):
    path = tmp_path / "config.toml"
    path.write_text(render_toml(config, documented=documented), encoding="utf-8")
    assert load_config(path) == config


def test_every_key_is_rendered_with_its_description():
    text = render_toml(default_config(), documented=True)
    prose = text.replace("\n# ", " ")
    for name, section in default_config():
        assert f"[{name}]" in text
        for key, field in type(section).model_fields.items():
            shown = f"[[{name}.{key}]]" if entry_class(field) else f"{key} ="
            assert f"\n{shown}" in text or f"\n# {shown}" in text
            assert field.description in prose, f"{name}.{key}"


def test_a_bare_file_has_no_comments_and_no_unset_keys():
    text = render_toml(default_config(), documented=False)
    assert "#" not in text
    assert tomllib.loads(text)["parallel"] == {
        "tensor": 1,
        "pipeline": 1,
        "context": 1,
        "sequence_parallel": False,
        "vision": "tensor",
    }


def test_lines_are_wrapped():
    assert max(map(len, render_toml(default_config(), documented=True).splitlines())) <= LINE_WIDTH
