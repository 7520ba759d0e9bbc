"""The trained model as a generator's forward pass: over its pipeline stages, with whole rows on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_vcr1.model.attention import CachedAttention
from megatron_vcr1.model.packed_batch import PackedBatch
from megatron_vcr1.model.qwen_vl import QwenVLModel
from megatron_vcr1.parallel import mesh


@contextmanager
def generating(model: QwenVLModel) -> Iterator[None]:
    """Set the model to evaluation, without gradients, sequence parallelism and FP8, and back afterwards.

    Both ask for numbers of rows that decoding does not have; the one saves activations that only training keeps, the
    other speeds up products of many rows.
    """
    holders: list[Any] = [one for module in model.modules() for one in (module, getattr(module, "config", None))]
    divided = [one for one in holders if getattr(one, "sequence_parallel", False)]
    was_training, fp8 = model.training, model.config.fp8
    model.eval()
    model.config.fp8 = None
    for one in divided:
        one.sequence_parallel = False
    try:
        with torch.no_grad():
            yield
    finally:
        for one in divided:
            one.sequence_parallel = True
        model.config.fp8 = fp8
        model.train(was_training)
        model.language_model.decoder.input_tensor = None


def forward_over_stages(model: QwenVLModel, batch: PackedBatch, cached: CachedAttention) -> Tensor | None:
    """The model's output for a batch on the last stage, None on the others; each hands on what it computes.

    While a stage waits, the next batch may already be under way behind it.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if not model.pre_process:
        shape = (len(batch.token_ids), 1, model.config.hidden_size)
        received = torch.empty(shape, dtype=model.config.pipeline_dtype, device=batch.token_ids.device)
        dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank(), group=pipeline)
        model.set_input_tensor([received])
    output = model(batch, cached)
    if model.post_process:
        return output
    dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group=pipeline)
    return None


def broadcast_from_last_stage(values: Tensor) -> None:
    """Overwrite a tensor with that of the rank that speaks for the copy, on every rank of the copy.

    Ranks that share the vocabulary could choose tokens each by itself, from equal logits; one chooses for all, since on
    a GPU cumulative sums are not the same from rank to rank.
    """
    copy = parallel_state.get_model_parallel_group()
    if copy.size() > 1:
        speaker = dist.get_process_group_ranks(copy)[-parallel_state.get_tensor_model_parallel_world_size()]
        assert (dist.get_rank() == speaker) == mesh.is_output_rank()
        dist.broadcast(values, speaker, group=copy)
