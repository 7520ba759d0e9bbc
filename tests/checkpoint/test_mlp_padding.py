"""The zero features that pad the MLPs of a vision tower: import, export, training, weight streaming and resume."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_vcr1.checkpoint.hf_export import export_checkpoint
from megatron_vcr1.checkpoint.hf_import import import_checkpoint
from megatron_vcr1.checkpoint.hf_stream import stream_hf_tensors
from megatron_vcr1.checkpoint.shard_slices import parameter_slices
from megatron_vcr1.checkpoint.torch_dist import read_metadata
from megatron_vcr1.checkpoint.verify import compare_weights
from megatron_vcr1.model.config import ModelConfig, mlp_padding
from megatron_vcr1.model.hf_layout import model_layout, published_name, to_megatron
from tests.checkpoint.hf_dirs import contents, random_weights, small_config, write_hf_dir
from tests.checkpoint.toy_run import ToyRun
from tests.gloo import GlooPool
from tests.model import tiny

pytestmark = pytest.mark.xdist_group("gloo")

WIDTH, PADDED_WIDTH = 1000, 1024


@pytest.mark.parametrize(
    ("width", "padded"),
    [(3420, 3584), (4304, 4608), (WIDTH, PADDED_WIDTH), (3456, 3456), (5120, 5120), (36, 36), (1100, 1100)],
)
def test_widths_that_are_padded(width: int, padded: int) -> None:
    assert width + mlp_padding(width) == padded
    if padded != width:
        assert all(padded % (ranks * 64) == 0 for ranks in (1, 2, 4, 8))


def test_import_and_export_restore_a_padded_model_byte_for_byte(tmp_path: Path) -> None:
    config = small_config()
    config["vision_config"] = config["vision_config"] | {"intermediate_size": WIDTH}
    hf_dir = write_hf_dir(tmp_path / "hf", config, random_weights(config))
    import_checkpoint(hf_dir, tmp_path / "imported")
    stored = read_metadata(tmp_path / "imported/megatron")
    mlp = "vision_tower.decoder.layers.1.mlp"
    assert stored[f"{mlp}.linear_fc1.weight"].shape == (2 * PADDED_WIDTH, 48)
    assert stored[f"{mlp}.linear_fc2.weight"].shape == (48, PADDED_WIDTH)
    comparison = compare_weights(hf_dir, tmp_path / "imported")
    assert comparison.num_identical == comparison.num_tensors == len(random_weights(config))
    export_checkpoint(tmp_path / "imported", tmp_path / "exported")
    assert contents(tmp_path / "exported") == contents(hf_dir)


def _check_padding(run: ToyRun) -> None:
    """Check that the padding of this rank's weights and gradients is zero, and that the weights beside it are not."""
    layouts = model_layout(run.model.model_config)
    num_padded = 0
    for parameter, slices in parameter_slices(run.model).items():
        if not layouts[slices[0].key].is_padded:
            continue
        layout = layouts[slices[0].key]
        is_useful = to_megatron(layout, {name: torch.ones(shape) for name, shape in layout.hf_shapes.items()}) > 0
        gradients = parameter.main_grad.flatten().split([len(part.values) for part in slices])
        for part, gradient in zip(slices, gradients, strict=True):
            place = tuple(slice(first, first + size) for first, size in zip(part.offsets, part.shape, strict=True))
            useful = is_useful[place].flatten()
            num_padded += int((~useful).sum())
            assert not part.values[~useful].any() and not gradient[~useful].any()
            assert not useful.any() or part.values[useful].any()
    # Of each of the three layers: 24 rows of gate and up with 32 columns and a bias, and 24 columns of down.
    total = torch.tensor(num_padded)
    torch.distributed.all_reduce(total)
    assert int(total) == 3 * (PADDED_WIDTH - WIDTH) * (3 * 32 + 2) * 4 // run.config.parallel.tensor


def _train(model_dir: Path, directory: Path, tensor: int, *, padded: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Train for two steps, from the checkpoint of the directory if there is one, and save a checkpoint."""
    with mock.patch("megatron_vcr1.model.config.mlp_padding", mlp_padding if padded else lambda width: 0):
        run = ToyRun(model_dir, directory, {"parallel": {"tensor": tensor}})
        is_resumed = run.resume() is not None
        if not is_resumed:
            published = load_file(model_dir / "model.safetensors").items()
            stream = dict(stream_hf_tensors(run.model))
            assert all(torch.equal(stream[published_name(name, stream)], values) for name, values in published)
        losses = [loss for loss, _ in run.train(2)]
        if padded:
            _check_padding(run)
        if not is_resumed:
            run.save()
            run.store.finish()
        return losses, {name: values.clone() for name, values in stream_hf_tensors(run.model)}


def test_padding_stays_zero_in_training_and_changes_nothing(tmp_path: Path, gloo_pool: GlooPool) -> None:
    model_dir = tmp_path / "model"
    tiny.create("qwen2_5_vl", model_dir, vision_ffn=WIDTH)
    assert ModelConfig.from_pretrained(model_dir).vision.ffn_padding == PADDED_WIDTH - WIDTH
    plain = [gloo_pool.run(_train, model_dir, tmp_path / "plain", 2, padded=False)[0] for _ in range(2)]
    # The second run resumes at another tensor-parallel size.
    padded = [gloo_pool.run(_train, model_dir, tmp_path / "padded", tensor, padded=True)[0] for tensor in (2, 4)]
    for (losses, weights), (expected_losses, expected) in zip(padded, plain, strict=True):
        assert losses == pytest.approx(expected_losses, rel=1e-5)
        assert weights.keys() == expected.keys()
        assert max(float((weights[name] - expected[name]).abs().max()) for name in expected) < 1e-4
