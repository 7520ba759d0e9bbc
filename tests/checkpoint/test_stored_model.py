from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vcr1.checkpoint.stored_model import open_model, read_model_metadata
from megatron_vcr1.checkpoint.torch_dist import TensorSpec, write_chunks, write_metadata
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import model_layout
from tests.checkpoint.hf_dirs import random_weights, small_config

LAYOUTS = model_layout(ModelConfig.from_dict(small_config()))
EMBEDDING = "language_model.embedding.word_embeddings.weight"  # [160, 96]
NORM = "language_model.decoder.final_layernorm.weight"


def test_chunks_give_the_rows_of_hugging_face_tensors(imported_dir: Path) -> None:
    model = open_model(imported_dir)
    weights = random_weights(small_config())
    assert model.num_bytes == sum(tensor.nbytes for tensor in weights.values())
    seen = {name: 0 for name in weights}
    for chunk in model.chunks:
        for rows in model.read(chunk):
            expected = weights[rows.hf_name].reshape(len(weights[rows.hf_name]), -1)
            num_rows, num_columns = rows.values.shape
            expected = expected[rows.row : rows.row + num_rows, rows.column : rows.column + num_columns]
            assert torch.equal(rows.values, expected), rows.hf_name
            seen[rows.hf_name] += rows.values.numel()
    assert seen == {name: tensor.numel() for name, tensor in weights.items()}


def _write_index(directory: Path, changes: dict[str, tuple[int, ...] | None]) -> None:
    """Write a checkpoint of zeros. `changes` gives some tensors another shape; None leaves a tensor out."""
    shapes = {key: layout.shape for key, layout in LAYOUTS.items()} | changes
    kept = {key: shape for key, shape in shapes.items() if shape is not None}
    specs: dict[str, TensorSpec] = {key: (torch.float32, shape) for key, shape in kept.items()}
    zeros = ((key, (0,) * len(shape), torch.zeros(shape)) for key, shape in kept.items())
    directory.mkdir()
    write_metadata(directory, specs, write_chunks(directory / "__0_0.distcp", zeros))


def test_a_padded_vocabulary_and_optimizer_state_are_accepted(tmp_path: Path) -> None:
    _write_index(tmp_path / "c", {EMBEDDING: (192, 96), f"optimizer.state.exp_avg.{NORM}": (96,)})
    assert read_model_metadata(tmp_path / "c", LAYOUTS)[EMBEDDING].shape == (192, 96)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({NORM: None}, f"{NORM} is missing"),
        ({NORM: (97,)}, rf"{NORM} has shape \(97,\) instead of \(96,\)"),
        ({EMBEDDING: (128, 96)}, rf"{EMBEDDING} has shape \(128, 96\) instead of"),
        ({"vision_tower.other.weight": (2,)}, r"vision_tower\.other\.weight is unexpected"),
    ],
)
def test_other_tensors_are_refused(tmp_path: Path, changes: dict[str, tuple[int, ...] | None], message: str) -> None:
    _write_index(tmp_path / "c", changes)
    with pytest.raises(UserError, match=message):
        read_model_metadata(tmp_path / "c", LAYOUTS)
