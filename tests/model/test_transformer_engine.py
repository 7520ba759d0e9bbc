"""The model with TransformerEngine's layers against the model with local layers.

On the CPU a stand-in replaces TransformerEngine. The real one, and FP8, are tested where it and a GPU exist.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.models.backends import BackendSpecProvider

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.checkpoint.shard_slices import parameter_slices
from megatron_vcr1.config.model_sections import ModelSection, ParallelSection, RecomputeSection
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.model import layer_specs, video_language_model
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.layer_specs import LocalBackend, choose_backend, transformer_engine_backend
from megatron_vcr1.model.presets import PRESETS
from megatron_vcr1.model.transformer_config import FP8_RECIPES, check_fp8
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.local.stages import generation_mode
from megatron_vcr1.throughput.random_weights import write_random_model
from tests.model import compare_specs, tiny

ROOT = Path(__file__).parents[2]
HAS_TE = importlib.util.find_spec("transformer_engine") is not None and torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not HAS_TE, reason="needs a GPU and TransformerEngine")
BF16_TOLERANCE = 2e-2
FP8_TOLERANCE = 2e-1


@pytest.fixture
def world() -> Iterator[None]:
    with mesh.world(ParallelSection()):
        yield


def test_stand_in_layers_load_the_same_checkpoints_and_compute_the_same(tmp_path: Path) -> None:
    """Runs in a process that has the stand-in on its path, so that megatron-core's own wrappers are built on it."""
    for family in tiny.FAMILIES:
        tiny.create(family, tmp_path / family)
    path = os.pathsep.join(str(folder) for folder in (ROOT / "tests/model/stand_in", ROOT, ROOT / "kernels"))
    command = [sys.executable, "-m", "tests.model.compare_specs", *(str(tmp_path / family) for family in tiny.FAMILIES)]
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    for found in json.loads(finished.stdout.splitlines()[-1]):
        assert set(found["keys"]) == set(found["expected_keys"])
        kinds = {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEColumnParallelLinear"}
        assert kinds <= set(found["classes"])
        assert found["logits"] < 1e-5 and found["gradient"] < 1e-5, found
        assert found["learned"] < 1e-4, found  # gradient norms are near 10
        assert found["states_without_targets"] == 0


def test_auto_chooses_local_layers_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_specs.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert isinstance(choose_backend("auto"), LocalBackend)
    with pytest.raises(UserError, match="'transformer_engine', but transformer_engine needs a GPU"):
        choose_backend("transformer_engine")


@pytest.mark.skipif(HAS_TE, reason="TransformerEngine is installed")
def test_a_transformer_engine_that_does_not_load_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_specs.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="does not load: No module named 'transformer_engine'"):
        choose_backend("auto")


@pytest.mark.skipif(HAS_TE, reason="TransformerEngine is installed")
def test_a_transformer_engine_of_mixed_versions_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine/__init__.py").write_text("assert False, 'package version mismatch'\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="does not load: package version mismatch"):
        transformer_engine_backend()


def test_fp8_needs_transformer_engine_and_half_precision(monkeypatch: pytest.MonkeyPatch, world: None) -> None:
    with pytest.raises(ValueError, match="fp8 needs TransformerEngine, but layer_spec is 'local'"):
        ModelSection(path="model", layer_spec="local", fp8="tensorwise")
    with pytest.raises(ValueError, match="fp8 needs dtype = 'bfloat16', not 'float32'"):
        ModelSection(path="model", dtype="float32", fp8="tensorwise")
    monkeypatch.setattr(video_language_model, "choose_backend", lambda requested: LocalBackend())
    run = RunConfig.model_validate({"model": {"path": "model", "fp8": "tensorwise"}})
    with pytest.raises(UserError, match=r"model\.fp8 = 'tensorwise' needs TransformerEngine and a GPU"):
        build_model(ModelConfig.from_dict(PRESETS["tiny"]), run.model, run.parallel, run.recompute)


@pytest.mark.parametrize(("recipe", "multiple"), [("tensorwise", 16), ("blockwise", 128), ("mxfp8", 32)])
def test_fp8_pads_tokens_and_is_off_in_generation(world: None, recipe: str, multiple: int) -> None:
    """Checks the settings only, since a CPU has no FP8 matmuls."""
    run = RunConfig.model_validate({"model": {"path": "model", "dtype": "float32"}})
    model = build_model(
        ModelConfig.from_dict(PRESETS["tiny"]), run.model, run.parallel, run.recompute, initialize_weights=True
    )
    assert model.token_multiple == 1
    model.config.fp8, model.config.fp8_recipe = "hybrid", recipe
    assert model.language_model.decoder.config.fp8 == "hybrid"  # megatron-core reads this before each layer
    assert model.token_multiple == multiple
    with generation_mode(model):
        assert model.language_model.decoder.config.fp8 is None
    assert model.config.fp8 == "hybrid"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose sizes FP8 supports, for the prompts of tests.model.tiny."""
    folder = tmp_path_factory.mktemp("te") / "model"
    tokens = {"image_token_id": tiny.IMAGE_PAD, "video_token_id": tiny.VIDEO_PAD}
    tokens |= {"vision_start_token_id": tiny.VISION_START, "vision_end_token_id": tiny.VISION_END}
    write_random_model(folder, {**PRESETS["tiny"], **tokens}, dtype=torch.bfloat16)
    return folder


@pytest.fixture
def te(world: None) -> BackendSpecProvider:
    return transformer_engine_backend()


RECOMPUTE = {
    "none": RecomputeSection(),
    "selective": RecomputeSection(granularity="selective", modules=("core_attn", "mlp")),
    "full": RecomputeSection(granularity="full"),
}


@on_gpu
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_on_a_gpu_both_backends_agree_in_bf16(te: BackendSpecProvider, model_dir: Path, recompute: str) -> None:
    expected = compare_specs.run(compare_specs.build(model_dir, LocalBackend(), torch.bfloat16))
    model = compare_specs.build(model_dir, te, torch.bfloat16, recompute=RECOMPUTE[recompute])
    found = compare_specs.differences(compare_specs.run(model), expected)
    print(f"TransformerEngine against local, bf16, recompute {recompute}: {found}")
    assert found["logits, relative"] < BF16_TOLERANCE and found["gradient, relative"] < BF16_TOLERANCE, found


@on_gpu
def test_on_a_gpu_no_token_needs_to_predict_anything(te: BackendSpecProvider, model_dir: Path) -> None:
    assert compare_specs.num_states_without_targets(compare_specs.build(model_dir, te, torch.bfloat16)) == 0


@on_gpu
def test_on_a_gpu_one_checkpoint_loads_into_both_backends(te: BackendSpecProvider, model_dir: Path) -> None:
    models = [compare_specs.build(model_dir, backend, torch.bfloat16) for backend in (te, LocalBackend())]
    ours, expected = (
        {(part.key, part.offsets): part.values for slices in parameter_slices(model).values() for part in slices}
        for model in models
    )
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in ours)


@on_gpu
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("recipe", FP8_RECIPES)
def test_on_a_gpu_fp8_is_near_bf16(te: BackendSpecProvider, model_dir: Path, recipe: str, recompute: str) -> None:
    try:
        text = ModelConfig.from_pretrained(model_dir).text
        check_fp8(recipe, text, ParallelSection(), torch.cuda.get_device_capability(), torch.version.cuda or "")
    except UserError as error:
        pytest.skip(str(error))
    expected = compare_specs.run(compare_specs.build(model_dir, te, torch.bfloat16))
    model = compare_specs.build(model_dir, te, torch.bfloat16, fp8=recipe, recompute=RECOMPUTE[recompute])
    found = compare_specs.differences(compare_specs.run(model), expected)
    print(f"FP8 {recipe} against bf16, recompute {recompute}: {found}")
    assert 0 < found["logits, relative"] < FP8_TOLERANCE and 0 < found["gradient, relative"] < FP8_TOLERANCE, found


@on_gpu
def test_on_a_gpu_generation_with_fp8_equals_bf16(world: None, model_dir: Path) -> None:
    run = RunConfig.model_validate({"model": {"path": model_dir, "fp8": "tensorwise"}})
    model = build_model(ModelConfig.from_pretrained(model_dir), run.model, run.parallel, run.recompute).to(
        mesh.device()
    )
    load_model_weights(model, model_dir)
    with generation_mode(model):  # the number of tokens is not a multiple of 16
        found = compare_specs.logits(model)
    expected = compare_specs.logits(compare_specs.build(model_dir, transformer_engine_backend(), torch.bfloat16))
    assert torch.equal(found, expected)
