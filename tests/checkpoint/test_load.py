"""Loading into the real model under several layouts, and exporting a checkpoint that a sharded model has saved."""

from __future__ import annotations

import multiprocessing
import queue
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_vcr1.checkpoint.hf_export import export_checkpoint
from megatron_vcr1.checkpoint.hf_import import import_checkpoint
from megatron_vcr1.checkpoint.load import load_model_weights
from megatron_vcr1.checkpoint.model_dir import MEGATRON_DIR, copy_model_files
from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.config.schema import RunConfig
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.hf_layout import model_layout, to_megatron
from megatron_vcr1.model.video_language_model import build_model
from megatron_vcr1.parallel import mesh
from tests.checkpoint.hf_dirs import FAMILIES, contents, random_weights, small_config, write_hf_dir
from tests.gloo import GlooPool

LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"tensor": 2},
    {"pipeline": 2},
    {"tensor": 2, "pipeline": 2, "sequence_parallel": True, "vision": "data"},
)

pytestmark = pytest.mark.xdist_group("gloo")


def _load_and_save(hf_dir: Path, imported_dir: Path, saved_dir: Path, parallel: dict[str, Any]) -> int:
    """Load from both directories, compare bitwise, and save; returns the number of parameters on this rank."""
    run = RunConfig.model_validate({"model": {"path": hf_dir}, "parallel": parallel})
    mesh.initialize(run.parallel)
    model = build_model(ModelConfig.from_pretrained(hf_dir), run.model, run.parallel, run.recompute)
    loaded = []
    for source in (hf_dir, imported_dir):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        load_model_weights(model, source)
        loaded.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    for name, from_hf in loaded[0].items():
        assert not from_hf.isnan().any(), f"{name} was not loaded"
        assert torch.equal(from_hf, loaded[1][name]), f"{name} differs"
    if dist.get_rank() == 0:
        (saved_dir / MEGATRON_DIR).mkdir(parents=True)
        copy_model_files(imported_dir, saved_dir)
    dist.barrier()
    # megatron-core writes from forked processes, which the pool's daemonic processes are not allowed to have, and gets
    # their results from a manager process, which would outlive the pool. A plain queue is enough here.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(model.sharded_state_dict(), str(saved_dir / MEGATRON_DIR))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_loads_the_same_weights_and_saves_an_exportable_checkpoint(
    tmp_path: Path, gloo_pool: GlooPool, family: str
) -> None:
    config = small_config(family, tied=family == "qwen2_vl")
    hf_dir = write_hf_dir(tmp_path / "hf", config, random_weights(config))
    import_checkpoint(hf_dir, tmp_path / "imported")
    for index, parallel in enumerate(LAYOUTS):
        saved_dir = tmp_path / f"saved{index}"
        num_parameters = gloo_pool.run(_load_and_save, hf_dir, tmp_path / "imported", saved_dir, parallel)
        if parallel:
            assert max(num_parameters) < sum(tensor.numel() for tensor in random_weights(config).values())
        export_checkpoint(saved_dir, saved_dir / "exported")
        assert contents(saved_dir / "exported") == contents(hf_dir), parallel


def _convert(hf_dir: Path, folder: Path) -> None:
    mesh.initialize(ParallelSection())
    import_checkpoint(hf_dir, folder / "imported")
    export_checkpoint(folder / "imported", folder / "exported")


def test_four_processes_convert_like_one(hf_dir: Path, tmp_path: Path, gloo_pool: GlooPool) -> None:
    gloo_pool.run(_convert, hf_dir, tmp_path)
    assert len(list((tmp_path / "imported" / MEGATRON_DIR).glob("*.distcp"))) == 4
    assert contents(tmp_path / "exported") == contents(hf_dir)


def _import_error(hf_dir: Path, out_dir: Path) -> str:
    mesh.initialize(ParallelSection())
    try:
        import_checkpoint(hf_dir, out_dir)
    except UserError as error:
        return str(error)
    return "no error"


def test_an_error_on_one_rank_is_raised_on_all_ranks(hf_dir: Path, imported_dir: Path, gloo_pool: GlooPool) -> None:
    errors = gloo_pool.run(_import_error, hf_dir, imported_dir)
    expected = "exists (Directory not empty); give the path of a new directory, or remove this one first"
    assert errors == [f"{imported_dir}: {expected}"] * 4


class _PaddedEmbedding:
    """A model of one tensor: an embedding of 160 rows, padded to [192, 96], in four shards by rows and columns."""

    key = "language_model.embedding.word_embeddings.weight"

    def __init__(self) -> None:
        self.model_config = ModelConfig.from_dict(small_config())
        self.shards = {f"{row}{column}": torch.full((96, 48), torch.nan) for row in range(2) for column in range(2)}

    def sharded_state_dict(self) -> dict[str, Any]:
        return {
            name: ShardedTensor.from_rank_offsets(
                self.key, shard, (0, int(name[0]), 2), (1, int(name[1]), 2), allow_shape_mismatch=True
            )
            for name, shard in self.shards.items()
        }

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> None:
        self.shards = state_dict


@pytest.mark.parametrize("source", ["hf", "imported"])
def test_padding_rows_of_the_vocabulary_are_zero(hf_dir: Path, imported_dir: Path, source: str) -> None:
    model = _PaddedEmbedding()
    with mesh.world(ParallelSection()):
        load_model_weights(model, hf_dir if source == "hf" else imported_dir)
    config = small_config()
    embedding = to_megatron(model_layout(ModelConfig.from_dict(config))[model.key], random_weights(config))
    shards = model.shards
    loaded = torch.cat((torch.cat((shards["00"], shards["01"]), 1), torch.cat((shards["10"], shards["11"]), 1)))
    assert torch.equal(loaded[:160], embedding.float())
    assert not loaded[160:].any()
