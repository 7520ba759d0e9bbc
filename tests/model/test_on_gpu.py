"""The model with Triton kernels and the in-process engine on a GPU; the other tests cover them on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vcr1.checkpoint.shard_slices import parameter_slices
from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.layer_specs import LocalBackend
from megatron_vcr1.model.packed_batch import pack
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.engine import GenerationRequest, SamplingParams
from megatron_vcr1.rollout.local.engine import LocalEngine
from megatron_vcr1.rollout.special_tokens import SpecialTokens
from tests.model import compare_specs, tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Relative to the norm. NVIDIA's containers let cuBLAS compute float32 matmuls in TF32; bfloat16 has 8 bits of mantissa.
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    with mesh.world(ParallelSection()):
        yield


def _transformers_results(folder: Path, family: str) -> dict[str, Tensor]:
    """Compute the results of `compare_specs.run` with transformers, in float32 on the CPU."""
    model = tiny.create(family, folder / "model")
    config = ModelConfig.from_pretrained(folder / "model")
    group = compare_specs.group(config)
    logits = torch.cat(
        [tiny.transformers_logits(model, config, group.prompt, response) for response in group.responses]
    )
    logits.log_softmax(-1).gather(1, torch.cat(group.responses)[:, None]).mean().backward()
    tiny.save_gradients(model, folder / "gradients", folder / "model")
    gradients = compare_specs.build(folder / "gradients", LocalBackend(), torch.float32)
    return {
        "logits": logits.detach().to(mesh.device()),
        **{slices[0].key: parameter.detach() for parameter, slices in parameter_slices(gradients).items()},
    }


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_and_gradients_equal_transformers(tmp_path: Path, family: str) -> None:
    expected = _transformers_results(tmp_path, family)
    for dtype, tolerance in TOLERANCES.items():
        model = compare_specs.build(tmp_path / "model", LocalBackend(), dtype)
        found = compare_specs.differences(compare_specs.run(model), expected)
        print(f"{family}, {dtype}, against transformers in float32 on the CPU: {found}")
        assert found["logits, relative"] < tolerance and found["gradient, relative"] < tolerance, (dtype, found)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_log_probs_of_the_in_process_engine_equal_those_of_training(tmp_path: Path, dtype: torch.dtype) -> None:
    tiny.create("qwen2_5_vl", tmp_path / "model")
    model = compare_specs.build(tmp_path / "model", LocalBackend(), dtype)
    tokens = SpecialTokens(frozenset(range(5, 25)), (tiny.IMAGE_PAD, tiny.VIDEO_PAD))
    engine = LocalEngine(model, tokens, str, max_batch_responses=256)
    kinds = enumerate(("", "i", "v", "ivv"))
    requests = [GenerationRequest(kind, tiny.prompt(kind, seed=3), 1 + index, index) for index, kind in kinds]
    generated = engine.generate(requests, SamplingParams(max_new_tokens=80))  # the cache grows, and responses end early
    worst = 0.0
    for request, group in zip(requests, generated, strict=True):
        responses = tuple(torch.tensor(rollout.token_ids) for rollout in group.rollouts)
        batch = pack([Group(request.id, request.prompt, responses)], model.model_config).to(mesh.device())
        with torch.no_grad():
            scored = model.log_probs(model(batch), batch.target_ids).cpu()
        sampled = torch.tensor([value for rollout in group.rollouts for value in rollout.log_probs])
        worst = max(worst, float((scored - sampled).abs().max()))
    print(f"log-probs of the local engine and of training, {dtype}: largest difference {worst:.2e}")
    assert worst < 5 * TOLERANCES[dtype]
