"""Comparison of the model with TransformerEngine's layers and with local layers, for the same weights.

Run as a program, it prints the differences as JSON. test_transformer_engine.py runs it in a subprocess, which has the
stand-in for TransformerEngine on its path.

    python -m tests.model.compare_specs MODEL_DIR...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from torch import Tensor

from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.checkpoint.shard_slices import parameter_slices
from megatron_vcr1.config.model_sections import ParallelSection, RecomputeSection
from megatron_vcr1.config.training_sections import OptimizerSection
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model import cpu
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import model_layout
from megatron_vcr1.model.layer_specs import LocalBackend, transformer_engine_backend
from megatron_vcr1.model.packed_batch import PackedBatch, pack
from megatron_vcr1.model.transformer_config import Fp8Recipe, text_transformer_config, vision_transformer_config
from megatron_vcr1.model.video_language_model import VideoLanguageModel
from megatron_vcr1.parallel import mesh
from megatron_vcr1.training.microbatches import Microbatch
from megatron_vcr1.training.optimizer import Learner
from tests.model import tiny


def build(
    folder: Path,
    backend: BackendSpecProvider,
    dtype: torch.dtype,
    *,
    fp8: Fp8Recipe | None = None,
    recompute: RecomputeSection | None = None,
) -> VideoLanguageModel:
    config = ModelConfig.from_pretrained(folder)
    settings = (ParallelSection(), recompute or RecomputeSection())
    model = VideoLanguageModel(
        config,
        text_transformer_config(config.text, *settings, dtype=dtype, fp8=fp8, initialize_weights=False),
        vision_transformer_config(config.vision, *settings, dtype=dtype, initialize_weights=False),
        backend,
    ).to(mesh.device())
    load_model_weights(model, folder)
    return model.train()


def group(config: ModelConfig) -> Group:
    """Return the models' input: an image, a video and text, and two responses."""
    return Group(
        "0", tiny.prompt("iv", seed=3, timestamps=config.media.timestamps_as_text), tiny.responses((4, 6), seed=4)
    )


def _batch(model: VideoLanguageModel) -> PackedBatch:
    return pack([group(model.model_config)], model.model_config, pad_to_multiple_of=model.token_multiple).to(
        mesh.device()
    )


def logits(model: VideoLanguageModel) -> Tensor:
    with torch.no_grad():
        return model.logits(model(_batch(model)))


def run(model: VideoLanguageModel) -> dict[str, Tensor]:
    """Return logits, and gradients by checkpoint key (the whole gradient of a gated weight has its first key)."""
    batch = _batch(model)
    hidden = model(batch)
    model.log_probs(hidden, batch.target_ids).mean().backward()
    results = {"logits": model.logits(hidden.detach()).detach()}
    for parameter, slices in parameter_slices(model).items():
        assert parameter.grad is not None
        results[slices[0].key] = parameter.grad
    return results


def learn(model: VideoLanguageModel) -> dict[str, Tensor]:
    """Return the gradient norms of two updates of two microbatches each, and the updated weights by checkpoint key."""
    learner = Learner(model, OptimizerSection(learning_rate=1e-2, epsilon=1.0, max_grad_norm=0.0), num_steps=2)
    assert all(getattr(module, "fuse_wgrad_accumulation", True) for module in model.modules())

    def loss(batch: Microbatch, hidden: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return -model.log_probs(hidden, batch.packed.target_ids).mean(), {}

    norms = [learner.update([Microbatch(_batch(model))] * 2, loss).grad_norm for _ in range(2)]
    weights = {part.key: part.values.detach() for slices in parameter_slices(model).values() for part in slices}
    return {"norms": torch.tensor(norms), **weights}


def num_states_without_targets(model: VideoLanguageModel) -> int:
    """Run forward and backward with a prompt that predicts nothing; return the number of hidden states.

    A context-parallel rank without responses has such a batch.
    """
    prompt = group(model.model_config).prompt
    hidden = model(pack([Group("0", prompt, ())], model.model_config).to(mesh.device()))
    hidden.sum().backward()
    return len(hidden)


def differences(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest difference and the relative error in norm, of the logits and of the gradients."""
    assert ours.keys() == expected.keys()
    found = {}
    for name, keys in (("logits", ["logits"]), ("gradient", [key for key in ours if key != "logits"])):
        pairs = [(ours[key].double(), expected[key].double()) for key in keys]
        found[name] = max(float((actual - target).abs().max()) for actual, target in pairs)
        error = sum(float((actual - target).square().sum()) for actual, target in pairs)
        found[f"{name}, relative"] = (error / sum(float(target.square().sum()) for _, target in pairs)) ** 0.5
    return found


def compare(folder: Path) -> dict[str, Any]:
    cpu.install()
    with mesh.world(ParallelSection()):
        model = build(folder, transformer_engine_backend(), torch.float32)
        expected = run(build(folder, LocalBackend(), torch.float32))
        learned, expected_learned = (
            learn(build(folder, backend, torch.float32)) for backend in (transformer_engine_backend(), LocalBackend())
        )
        assert learned.keys() == expected_learned.keys()
        return {
            "learned": max(float((learned[key] - expected_learned[key]).abs().max()) for key in learned),
            "keys": sorted(part.key for slices in parameter_slices(model).values() for part in slices),
            "expected_keys": sorted(model_layout(model.model_config)),
            "classes": sorted({type(module).__name__ for module in model.modules()}),
            **differences(run(model), expected),
            "states_without_targets": num_states_without_targets(model),
        }


if __name__ == "__main__":
    print(json.dumps([compare(Path(folder)) for folder in sys.argv[1:]]))
