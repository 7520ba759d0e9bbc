"""Checks that an exported model gives the same answers in transformers as in `vcr1 evaluate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText
from vcr1_kernels import frames_to_patches

from megatron_vcr1.config.loading import load_config
from megatron_vcr1.data.encoding import EncodedPrompt
from megatron_vcr1.data.manifest import read_manifest
from megatron_vcr1.data.preparation import CachedVideoReader, build_prepare_fn
from megatron_vcr1.data.processor import PromptProcessor
from megatron_vcr1.data.templates import load_templates
from megatron_vcr1.evaluation.predictions import read_predictions
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.mrope import prompt_positions
from megatron_vcr1.rollout.special_tokens import SpecialTokens


def compare_answers(export: Path, tests: Sequence[Path], evaluation: Path, num_samples: int) -> dict[str, Any]:
    """Generate responses to the first samples of each benchmark with transformers, greedily and without a KV cache.

    Args:
        export: Hugging Face directory of the model.
        tests: configuration files that `vcr1 evaluate` was run with.
        evaluation: directory with the results of `vcr1 evaluate`.
        num_samples: samples of each benchmark.

    Returns:
        num_answers, num_equal, and up to five responses that differ.
    """
    config = ModelConfig.from_pretrained(export)
    processor = PromptProcessor.from_pretrained(export, config)
    special = SpecialTokens.from_pretrained(export, processor, config.num_embeddings)
    model = AutoModelForImageTextToText.from_pretrained(export, dtype=torch.float32).eval()
    num_answers, different = 0, []
    for run in map(load_config, tests):
        templates, reader = load_templates(run.data.templates), CachedVideoReader(run.data)
        for benchmark in run.evaluate.benchmarks:
            prepare = build_prepare_fn(run.data, templates, processor, reader, thinking=benchmark.thinking)
            predictions = read_predictions(evaluation / str(benchmark.label) / "predictions.jsonl")
            for sample in read_manifest(benchmark.manifest)[:num_samples]:
                token_ids = greedy_response(model, config, special, prepare(sample).prompt, run.evaluate.max_new_tokens)
                response, predicted = processor.decode(token_ids), predictions[sample.id].output
                num_answers += 1
                if response != predicted:
                    different.append({"id": sample.id, "transformers": response, "vcr1": predicted})
    return {"num_answers": num_answers, "num_equal": num_answers - len(different), "different": different[:5]}


@torch.no_grad()
def greedy_response(
    model: Any, config: ModelConfig, special: SpecialTokens, prompt: EncodedPrompt, max_new_tokens: int
) -> Tensor:
    """Decode greedily up to an end token, excluding vision tokens.

    The positions are passed explicitly, because transformers 5 gives the text after a video other positions than the
    published models were trained with.

    Returns:
        int64 [num_tokens], without the prompt.
    """
    (video,) = prompt.vision
    vision = config.vision
    positions = prompt_positions(config, prompt)
    patches = frames_to_patches(
        video.frames,
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.merge_size,
        mean=vision.pixel_mean,
        std=vision.pixel_std,
    )
    token_ids = prompt.token_ids
    for _ in range(max_new_tokens):
        tail = torch.arange(len(token_ids) - len(prompt.token_ids)) + int(positions.max()) + 1
        logits = model(
            input_ids=token_ids[None],
            attention_mask=torch.ones_like(token_ids)[None],
            position_ids=torch.cat((positions, tail.expand(3, -1)), dim=1)[:, None],
            pixel_values_videos=patches,
            video_grid_thw=torch.tensor([video.grid_thw]),
            use_cache=False,
        ).logits[0, -1]
        logits[list(special.never_sampled)] = -torch.inf
        token_ids = torch.cat((token_ids, logits.argmax()[None]))
        if int(token_ids[-1]) in special.end:
            break
    return token_ids[len(prompt.token_ids) :]


def write_comparison(export: Path, tests: Sequence[Path], evaluation: Path, out: Path, num_samples: int = 8) -> None:
    """Write the result of `compare_answers` to a JSON file.

    Raises:
        RuntimeError: at least one response differs.
    """
    result = compare_answers(export, tests, evaluation, num_samples)
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"transformers: {result['num_equal']} of {result['num_answers']} responses equal those of vcr1 evaluate")
    if result["different"]:
        raise RuntimeError(f"transformers gives a different response: {result['different'][0]}")
