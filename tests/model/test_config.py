"""Reading of config.json in both of its layouts, and the errors for models that are not supported."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ExpertsConfig, ModelConfig, TextConfig
from tests.model import tiny

YARN = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 256, "mrope_section": [1, 1, 2]}
PUBLISHED_AXES = (*[0] * 16, *[1] * 24, *[2] * 24)
HOSTILE_JSON = [
    ("[" * 100_000, "nested too deeply"),
    ('{"vocab_size": ' + "9" * 5_000 + "}", "not JSON that can be read"),
]


def test_published_qwen2_5_vl_7b(realdata: Path) -> None:
    config = ModelConfig.from_pretrained(realdata / "qwen" / "Qwen2.5-VL-7B-Instruct")
    text, vision = config.text, config.vision
    assert (text.num_layers, text.hidden_size, text.ffn_hidden_size, text.vocab_size) == (28, 3584, 18944, 152064)
    assert (text.num_heads, text.num_kv_heads, text.head_dim, text.mrope_axes) == (28, 4, 128, PUBLISHED_AXES)
    assert (text.rope_theta, text.norm_epsilon, text.tied_embeddings) == (1e6, 1e-6, False)
    assert (vision.num_layers, vision.hidden_size, vision.ffn_hidden_size, vision.num_heads) == (32, 1280, 3420, 16)
    assert (vision.window_size, vision.full_attention_layers, vision.tokens_per_second) == (112, (7, 15, 23, 31), 2)
    assert (vision.out_hidden_size, vision.patch_dim) == (3584, 1176)
    assert (config.image_token_id, config.video_token_id) == (151655, 151656)


@pytest.mark.parametrize("name", ["Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL-7B-Instruct", "Qwen2-VL-7B-Instruct"])
def test_published_files_are_read_as_transformers_reads_them(realdata: Path, tmp_path: Path, name: str) -> None:
    raw = json.loads((realdata / "qwen" / name / "config.json").read_text())
    raw.pop("quantization_config", None)  # one of the files is a quantized model's
    (tmp_path / "config.json").write_text(json.dumps(raw))
    _assert_equals_transformers(tmp_path)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_files_of_transformers_5_are_read_as_transformers_reads_them(tmp_path: Path, family: str) -> None:
    tiny.hf_config(family).save_pretrained(tmp_path)
    _assert_equals_transformers(tmp_path)


def _axes(rope: dict[str, Any]) -> tuple[int, ...]:
    section = rope["mrope_section"]
    if not rope.get("mrope_interleaved"):
        return tuple(axis for axis, number in enumerate(section) for _ in range(number))
    return tuple(
        axis if axis and place < 3 * section[axis] else 0 for place in range(sum(section)) for axis in [place % 3]
    )


def _experts(text: Any) -> ExpertsConfig:
    layers = [
        index
        for index in range(text.num_hidden_layers)
        if index not in text.mlp_only_layers and (index + 1) % text.decoder_sparse_step == 0
    ]
    sizes = text.num_experts, text.num_experts_per_tok, text.moe_intermediate_size
    return ExpertsConfig(*sizes, frozenset(layers))


def _assert_equals_transformers(model_dir: Path) -> None:
    ours, theirs = ModelConfig.from_pretrained(model_dir), transformers.AutoConfig.from_pretrained(model_dir)
    text, vision = theirs.get_text_config(), theirs.vision_config
    assert (ours.family.model_type, ours.image_token_id, ours.video_token_id) == (
        theirs.model_type,
        theirs.image_token_id,
        theirs.video_token_id,
    )
    assert ours.text == TextConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_heads=text.num_attention_heads,
        num_kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", text.hidden_size // text.num_attention_heads),
        vocab_size=text.vocab_size,
        norm_epsilon=text.rms_norm_eps,
        rope_theta=text.rope_parameters["rope_theta"],
        mrope_axes=_axes(text.rope_parameters),
        qkv_bias=not theirs.model_type.startswith("qwen3_vl"),
        qk_norm=theirs.model_type.startswith("qwen3_vl"),
        tied_embeddings=theirs.tie_word_embeddings,
        max_positions=text.max_position_embeddings,
        experts=_experts(text) if theirs.model_type == "qwen3_vl_moe" else None,
    )
    assert (ours.vision.num_layers, ours.vision.num_heads) == (vision.depth, vision.num_heads)
    assert (ours.vision.patch_size, ours.vision.temporal_patch_size) == (vision.patch_size, vision.temporal_patch_size)
    assert ours.vision.merge_size == vision.spatial_merge_size
    if theirs.model_type == "qwen2_5_vl":
        assert (ours.vision.hidden_size, ours.vision.out_hidden_size) == (vision.hidden_size, vision.out_hidden_size)
        assert (ours.vision.ffn_hidden_size, ours.vision.window_size) == (vision.intermediate_size, vision.window_size)
        assert ours.vision.full_attention_layers == tuple(vision.fullatt_block_indexes)
        assert ours.vision.tokens_per_second == vision.tokens_per_second
    elif theirs.model_type.startswith("qwen3_vl"):
        assert (ours.vision.hidden_size, ours.vision.out_hidden_size) == (vision.hidden_size, vision.out_hidden_size)
        assert ours.vision.ffn_hidden_size == vision.intermediate_size
        assert ours.vision.deepstack_layers == tuple(vision.deepstack_visual_indexes)
        assert ours.vision.positions_per_side**2 == vision.num_position_embeddings
    else:
        assert (ours.vision.hidden_size, ours.vision.out_hidden_size) == (vision.embed_dim, vision.hidden_size)
        assert ours.vision.ffn_hidden_size == vision.embed_dim * vision.mlp_ratio


def test_keys_that_published_qwen2_vl_omits_have_defaults() -> None:
    raw = {
        "model_type": "qwen2_vl",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "vocab_size": 151936,
        "vision_config": {"hidden_size": 1536, "in_chans": 3, "spatial_patch_size": 14},
    }
    vision = ModelConfig.from_dict(raw).vision
    assert (vision.num_layers, vision.hidden_size, vision.ffn_hidden_size, vision.num_heads) == (32, 1280, 5120, 16)
    assert vision.out_hidden_size == 1536
    assert ModelConfig.from_dict(raw).text.tied_embeddings


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_nested_layout_of_transformers_5(family: str) -> None:
    config = ModelConfig.from_dict(tiny.hf_config(family).to_dict())
    assert (config.family.model_type, config.text.num_layers, config.text.rope_theta) == (family, 4, 1e4)
    assert config.vision.gated is (family == "qwen2_5_vl")
    assert (config.vision.normalization == "RMSNorm") is (family == "qwen2_5_vl")
    assert config.text.tied_embeddings is (family in ("qwen2_vl", "qwen3_vl"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("whole", [{}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("text", [{}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}])
def test_tied_embeddings_are_found_wherever_a_transformers_version_wrote_them(
    family: str, whole: dict[str, bool], text: dict[str, bool]
) -> None:
    theirs = tiny.hf_config(family)
    raw = theirs.to_dict()
    del raw["tie_word_embeddings"]
    raw |= whole
    raw["text_config"] |= text
    expected = type(theirs).from_dict(raw).tie_word_embeddings
    assert ModelConfig.from_dict(raw).text.tied_embeddings is expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; it is not supported"),
        ({"vision_config": None}, "vision_config is missing"),
        ({"text_config": {"num_hidden_layers": None}}, "lacks 'num_hidden_layers'"),
        ({"text_config": {"num_attention_heads": 7}}, "hidden size 96 is not a multiple of 7 heads"),
        ({"text_config": {"num_key_value_heads": 5}}, "12 heads are not a multiple of 5 key-value heads"),
        ({"text_config": {"rope_parameters": {"mrope_section": [1, 1, 1]}}}, "mrope_section [1, 1, 1] must sum to"),
        (
            {"text_config": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}},
            "rope_parameters: rope_type is 'dynamic'",
        ),
        (
            {"text_config": {"rope_parameters": YARN | {"mscale": 1.0}}},
            "mscale is 1.0; it is not supported with 'yarn'; leave it out",
        ),
        (
            {"text_config": {"rope_parameters": YARN | {"attention_factor": 1.0}}},
            "attention_factor is 1.0; it is not supported with 'yarn'; leave it out",
        ),
        (
            {"text_config": {"rope_parameters": YARN | {"rope_type": "default", "type": "yarn"}}},
            "rope_parameters: rope_type is 'default', but type, its old name, is 'yarn'; keep rope_type",
        ),
        (
            {"text_config": {"rope_scaling": YARN}},
            "text_config: rope_scaling describe different rotary positions; remove one",
        ),
        ({"rope_scaling": YARN}, "text_config: rope_parameters describe different rotary positions; remove one"),
        (
            {"text_config": {"rope_parameters": YARN | {"truncate": False}}},
            "truncate is False; it is not supported with 'yarn'",
        ),
        (
            {"text_config": {"rope_parameters": YARN | {"original_max_position_embeddings": None}}},
            "lacks 'original_max_position_embeddings'",
        ),
        ({"text_config": {"use_sliding_window": True}}, "use_sliding_window is True"),
        (
            {"vision_config": {"out_hidden_size": 64}},
            "the merger's output has 64 features, but the language model's hidden size is 96",
        ),
        ({"vision_config": {"window_size": 14}}, "window_size 14 is smaller than one merged token"),
    ],
)
def test_unsupported_models_are_errors_that_name_the_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    raw = tiny.hf_config("qwen2_5_vl").to_dict()
    for key, value in change.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) and key in raw else value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError) as error:
        ModelConfig.from_pretrained(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)
    assert message in str(error.value)


def test_videos_of_qwen3_vl_have_patches_of_16_pixels_by_default(tmp_path: Path) -> None:
    raw = tiny.hf_config("qwen3_vl").to_dict()
    raw["vision_config"]["patch_size"] = 16
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "preprocessor_config.json").write_text('{"patch_size": 16}')
    (tmp_path / "video_preprocessor_config.json").write_text("{}")
    assert ModelConfig.from_pretrained(tmp_path).vision.patch_size == 16


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_null_is_a_missing_key(family: str) -> None:
    raw = tiny.hf_config(family).to_dict()
    expected = ModelConfig.from_dict(raw)
    raw["vision_config"] |= dict.fromkeys(("hidden_act", "in_channels", "in_chans"))
    raw["text_config"]["hidden_act"] = raw["hidden_act"] = None
    assert ModelConfig.from_dict(raw) == expected


@pytest.mark.parametrize(
    "name, nest",
    [("preprocessor_config.json", lambda x: x), ("processor_config.json", lambda x: {"image_processor": x})],
)
def test_pixel_statistics_come_from_the_processor_file(tmp_path: Path, name: str, nest: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.hf_config("qwen2_5_vl").to_dict()))
    assert ModelConfig.from_pretrained(tmp_path).vision.pixel_mean[0] == 0.48145466
    sizes = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [1, 2, 3]}
    (tmp_path / name).write_text(json.dumps(nest(sizes | statistics)))
    vision = ModelConfig.from_pretrained(tmp_path).vision
    assert (vision.pixel_mean, vision.pixel_std) == ((0.5, 0.4, 0.3), (1, 2, 3))


@pytest.mark.parametrize(
    "content, message",
    [(None, "not found"), ("{", "not JSON"), ("[]", "expected a JSON object, got a list"), *HOSTILE_JSON],
)
def test_missing_and_damaged_files_are_errors(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        ModelConfig.from_pretrained(tmp_path)


def test_the_error_for_a_directory_without_a_model_gives_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run is a run directory: name its export"):
        ModelConfig.from_pretrained("run")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").touch()
    with pytest.raises(UserError, match="adapter holds a LoRA adapter: merge it into its base model"):
        ModelConfig.from_pretrained("adapter")
    (tmp_path / "imported/megatron").mkdir(parents=True)
    (tmp_path / "imported/config.json").touch()
    with pytest.raises(UserError, match=r"name the directory that it is in, imported$"):
        ModelConfig.from_pretrained("imported/megatron")
    with pytest.raises(UserError, match=r"hf download Qwen/Qwen2\.5-VL-7B-Instruct --local-dir DIR"):
        ModelConfig.from_pretrained("Qwen/Qwen2.5-VL-7B-Instruct")


WRONG_VALUES: list[tuple[dict[str, Any], str]] = [
    ({"text_config": {"num_hidden_layers": "4"}}, "num_hidden_layers is '4'; it must be an integer from 1 to"),
    ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000; it must be an integer"),
    ({"text_config": {"num_hidden_layers": 4.5}}, "num_hidden_layers is 4.5; it must be an integer"),
    ({"text_config": {"num_hidden_layers": True}}, "num_hidden_layers is True; it must be an integer"),
    ({"text_config": {"num_hidden_layers": 0}}, "num_hidden_layers is 0; it must be an integer"),
    ({"text_config": {"num_attention_heads": -12}}, "num_attention_heads is -12; it must be an integer"),
    ({"text_config": {"num_attention_heads": [12]}}, "num_attention_heads is [12]; it must be an integer"),
    ({"text_config": {"num_key_value_heads": 0}}, "num_key_value_heads is 0; it must be an integer"),
    ({"text_config": {"hidden_size": {"a": 1}}}, "hidden_size is {'a': 1}; it must be an integer"),
    ({"text_config": {"vocab_size": 10**30}}, "vocab_size is 1000000000000000000000000000000; it must be an integer"),
    ({"text_config": {"rms_norm_eps": "1e-6"}}, "rms_norm_eps is '1e-6'; it must be a number above 0 and below 1"),
    ({"text_config": {"rms_norm_eps": float("nan")}}, "rms_norm_eps is nan; it must be a number above 0"),
    ({"text_config": {"hidden_act": "gelu"}}, "hidden_act is 'gelu'; it must be 'silu'"),
    ({"text_config": {"rope_parameters": {"mrope_section": [1, 1, "2"]}}}, "mrope_section is [1, 1, '2']; it must be"),
    ({"text_config": {"rope_parameters": {"mrope_section": [4]}}}, "mrope_section is [4]; it must be a list of 3"),
    ({"text_config": {"rope_parameters": {"mrope_section": 4}}}, "mrope_section is 4; it must be a list of 3"),
    ({"text_config": {"rope_parameters": [1]}}, "rope_parameters: expected a JSON object, got a list"),
    ({"text_config": {"rope_parameters": {"mrope_section": [1, 1, 2], "rope_theta": -1}}}, "rope_theta is -1; it must"),
    ({"text_config": {"layer_types": ["full_attention"] * 6}}, "layer_types has 6 entries, but num_hidden_layers is 4"),
    ({"text_config": {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}}, "contains 'sliding_attention'"),
    ({"text_config": {"layer_types": "full_attention"}}, "layer_types is 'full_attention'; it must be a list"),
    ({"text_config": {"layer_types": [1, 2, 3, 4]}}, "layer_types is [1, 2, 3, 4]; it must be a list of strings"),
    ({"text_config": {"tie_word_embeddings": "no"}}, "tie_word_embeddings is 'no'; it must be true or false"),
    ({"text_config": {"use_sliding_window": 0}}, "use_sliding_window is 0; it must be true or false"),
    ({"text_config": None}, "lacks 'num_hidden_layers'"),
    ({"text_config": []}, "text_config: expected a JSON object, got a list"),
    ({"text_config": 7}, "text_config: expected a JSON object, got a number"),
    ({"vision_config": [1]}, "vision_config: expected a JSON object, got a list"),
    ({"vision_config": {"hidden_size": "32"}}, "vision_config: hidden_size is '32'; it must be an integer"),
    ({"vision_config": {"intermediate_size": None}}, "vision_config: lacks 'intermediate_size'"),
    ({"vision_config": {"depth": -1}}, "vision_config: depth is -1; it must be an integer"),
    ({"vision_config": {"patch_size": 0}}, "vision_config: patch_size is 0; it must be an integer"),
    ({"vision_config": {"spatial_merge_size": 10**6}}, "vision_config: spatial_merge_size is 1000000; it must be"),
    ({"vision_config": {"temporal_patch_size": "2"}}, "vision_config: temporal_patch_size is '2'; it must be"),
    ({"vision_config": {"fullatt_block_indexes": 7}}, "fullatt_block_indexes is 7; it must be a list"),
    ({"vision_config": {"fullatt_block_indexes": [-1]}}, "fullatt_block_indexes is [-1]; it must be a list"),
    ({"vision_config": {"tokens_per_second": 0}}, "tokens_per_second is 0; it must be an integer"),
    ({"vision_config": {"in_channels": 1}}, "in_channels is 1; it must be 3"),
    ({"vision_config": {"rope_parameters": {"rope_theta": 1e6}}}, "rope_theta is 1000000.0; it must be 10000"),
    ({"image_token_id": "190"}, "image_token_id is '190'; it must be an integer"),
    ({"image_token_id": 204}, "image_token_id is 204; it must be below vocab_size, which is 204"),
    ({"video_token_id": -1}, "video_token_id is -1; it must be an integer"),
    ({"model_type": ["qwen2_vl"]}, "model_type is ['qwen2_vl']"),
    ({"model_type": None}, "model_type is None"),
]


@pytest.mark.parametrize("change, message", WRONG_VALUES)
def test_a_wrong_value_is_an_error_that_names_file_key_and_value(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    raw = tiny.hf_config("qwen2_5_vl").to_dict()
    for key, value in change.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) and key in raw else value
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError) as error:
        ModelConfig.from_pretrained(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "config.json"))
    assert message in str(error.value)


def test_text_config_null_means_that_the_keys_are_at_the_top_level(tmp_path: Path) -> None:
    raw = tiny.hf_config("qwen2_5_vl").to_dict()
    (tmp_path / "config.json").write_text(
        json.dumps({**raw, **raw["text_config"], "text_config": None, "model_type": "qwen2_5_vl"})
    )
    assert ModelConfig.from_pretrained(tmp_path) == ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    "key, config_key, value",
    [("patch_size", "patch_size", 16), ("merge_size", "spatial_merge_size", 1), ("temporal_patch_size", "", 4)],
)
@pytest.mark.parametrize("section", [None, "image_processor"])
def test_a_processor_with_other_patches_than_the_model_is_refused(
    tmp_path: Path, key: str, config_key: str, value: int, section: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny.hf_config("qwen2_5_vl").to_dict()))
    file = tmp_path / ("processor_config.json" if section else "preprocessor_config.json")
    settings = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    expected, settings[key] = settings[key], value
    file.write_text(json.dumps({section: settings} if section else settings))
    with pytest.raises(UserError) as error:
        ModelConfig.from_pretrained(tmp_path)
    assert str(error.value).startswith(f"{file}: ")
    assert f"{key} is {value}, but {tmp_path / 'config.json'}: " in str(error.value)
    assert f"{config_key or key} is {expected}" in str(error.value)


def test_a_fifo_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config\.json: not a regular file"):
        ModelConfig.from_pretrained(tmp_path)


def test_random_values_are_read_or_refused(tmp_path: Path) -> None:
    """No value of any key makes another exception than UserError."""
    raw = tiny.hf_config("qwen2_5_vl").to_dict()
    junk = [None, True, -1, 0, 3, 10**30, 1.5, float("nan"), float("inf"), "", "7", [], [1], {}, {"a": []}]
    sections: list[dict[str, Any]] = [
        raw,
        raw["text_config"],
        raw["vision_config"],
        raw["text_config"]["rope_parameters"],
    ]
    for section in sections:
        for key in list(section):
            before = section[key]
            for value in junk:
                section[key] = value
                with contextlib.suppress(UserError):
                    ModelConfig.from_dict(json.loads(json.dumps(raw)))
            section[key] = before
