"""Is a converted checkpoint the Hugging Face model? Every tensor compared, a chunk at a time."""

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
    """How far a checkpoint is from a Hugging Face model."""

    num_bytes: int  # compared
    max_abs_differences: dict[str, float]  # by published tensor name; infinite where only one of two numbers is finite
    num_identical: int  # tensors that agree in every bit

    @property
    def num_tensors(self) -> int:
        return len(self.max_abs_differences)


def compare_weights(hf_dir: Path, model_dir: Path, *, progress: Progress = no_progress) -> WeightComparison:
    """Compare an imported or trained directory, in the dtypes of its export, with a Hugging Face directory.

    Args:
        hf_dir: config.json and safetensors.
        model_dir: what `import_checkpoint` or training wrote.
        progress: see `workers.Progress`.

    Raises:
        UserError: one of them is incomplete or damaged, or they are models of different families or shapes.
    """
    theirs, ours = ModelConfig.from_pretrained(hf_dir), ModelConfig.from_pretrained(model_dir)
    if theirs.family != ours.family:
        raise UserError(f"{hf_dir} is a {theirs.family} model, and {model_dir} a {ours.family} one; name two of a kind")
    if theirs.shape != ours.shape:
        raise UserError(f"{hf_dir} and {model_dir} are models of different sizes: {theirs.shape}, {ours.shape}")
    model = open_model(model_dir)
    differences = dict.fromkeys(model.places, 0.0)
    differing = set()
    total = sum(chunk.num_bytes for chunk in model.chunks)
    with HfWeights(hf_dir, model.layouts) as weights:
        for chunk in model.chunks:
            for rows in model.read(chunk):
                actual = rows.values.to(model.places[rows.hf_name][0].tensor.dtype)
                expected = weights.read_hf_rows(rows.hf_name, rows.row, actual.shape[0])
                expected = expected[:, rows.column : rows.column + actual.shape[1]]
                if not _same_bits(actual, expected):
                    differing.add(rows.hf_name)
                    differences[rows.hf_name] = max(differences[rows.hf_name], _max_abs_difference(actual, expected))
            progress(chunk.num_bytes, total)
    return WeightComparison(model.num_bytes, differences, len(differences) - len(differing))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _max_abs_difference(one: Tensor, other: Tensor) -> float:
    """The largest |one - other|, in float64; equal infinities and pairs of NaN differ by 0."""
    one, other = one.double(), other.double()
    same = (one == other) | (one.isnan() & other.isnan())
    return float((one - other).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(same, 0.0).max())
