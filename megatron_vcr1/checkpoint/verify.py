"""Comparison of a Megatron checkpoint with a Hugging Face model, tensor by tensor, one chunk at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_vcr1.checkpoint.hf_weights import HfWeights
from megatron_vcr1.checkpoint.new_directory import Progress, no_progress
from megatron_vcr1.checkpoint.stored_model import open_model
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class WeightComparison:
    """Differences between a checkpoint and a Hugging Face model."""

    num_bytes: int  # size of the compared tensors
    max_abs_differences: dict[str, float]  # by published name; infinite if only one of two values is finite
    num_identical: int  # number of tensors that are bitwise identical

    @property
    def num_tensors(self) -> int:
        return len(self.max_abs_differences)


def compare_weights(hf_dir: Path, model_dir: Path, *, progress: Progress = no_progress) -> WeightComparison:
    """Compare an imported model or a training checkpoint with a Hugging Face model, in the dtypes of its export.

    Args:
        hf_dir: Hugging Face directory.
        model_dir: imported model or training checkpoint.
        progress: see `new_directory.Progress`.

    Raises:
        UserError: one of the two is incomplete or damaged, or their families or shapes differ.
    """
    theirs, ours = ModelConfig.from_pretrained(hf_dir), ModelConfig.from_pretrained(model_dir)
    if theirs.family != ours.family:
        raise UserError(
            f"{hf_dir} is a {theirs.family.title} model, but {model_dir} is a {ours.family.title} model; compare "
            "models of one family"
        )
    if theirs.shape != ours.shape:
        raise UserError(f"{hf_dir} and {model_dir} have different shapes: {theirs.shape}, {ours.shape}")
    model = open_model(model_dir)
    differences = dict.fromkeys(model.locations, 0.0)
    differing = set()
    total = sum(chunk.num_bytes for chunk in model.chunks)
    with HfWeights(hf_dir, model.layouts) as weights:
        for chunk in model.chunks:
            for rows in model.read(chunk):
                actual = rows.values.to(model.locations[rows.hf_name][0].tensor.dtype)
                expected = weights.read_hf_rows(rows.hf_name, rows.row, actual.shape[0])
                expected = expected[:, rows.column : rows.column + actual.shape[1]]
                if not _is_bitwise_equal(actual, expected):
                    differing.add(rows.hf_name)
                    differences[rows.hf_name] = max(differences[rows.hf_name], _max_abs_difference(actual, expected))
            progress(chunk.num_bytes, total)
    return WeightComparison(model.num_bytes, differences, len(differences) - len(differing))


def _is_bitwise_equal(first: Tensor, second: Tensor) -> bool:
    if first.dtype != second.dtype:
        return False
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def _max_abs_difference(first: Tensor, second: Tensor) -> float:
    """Return the largest |first - second|, in float64. Equal infinities, and two NaN, have difference 0."""
    first, second = first.double(), second.double()
    same = (first == second) | (first.isnan() & second.isnan())
    return float((first - second).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(same, 0.0).max())
