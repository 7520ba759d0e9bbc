"""Forward passes of the in-process engine through the pipeline stages, without sequence parallelism."""

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
from megatron_vcr1.model.video_language_model import VideoLanguageModel
from megatron_vcr1.parallel import mesh


@contextmanager
def generation_mode(model: VideoLanguageModel) -> Iterator[None]:
    """Put the model into evaluation mode, without gradients, sequence parallelism and FP8, and restore it afterwards.

    Sequence parallelism and FP8 both require token counts with certain divisors, which a decoding batch does not have.
    Neither helps here: the first saves activation memory, the second speeds up matmuls with many rows.
    """
    # Modules copy the setting when they are built, so it must be changed on every module and every config.
    holders: list[Any] = [holder for module in model.modules() for holder in (module, getattr(module, "config", None))]
    sequence_parallel = [holder for holder in holders if getattr(holder, "sequence_parallel", False)]
    was_training, fp8 = model.training, model.config.fp8
    model.eval()
    model.config.fp8 = None
    for holder in sequence_parallel:
        holder.sequence_parallel = False
    try:
        with torch.no_grad():
            yield
    finally:
        for holder in sequence_parallel:
            holder.sequence_parallel = True
        model.config.fp8 = fp8
        model.train(was_training)
        model.language_model.decoder.input_tensor = None


def forward_through_stages(model: VideoLanguageModel, batch: PackedBatch, cached: CachedAttention) -> Tensor | None:
    """Compute this rank's stage: receive hidden states from the previous stage, and send them to the next one.

    The tensor- and pipeline-parallel ranks must call it together, for the same batches in the same order; in a prefill
    the context-parallel ranks must, too. A stage only waits for the previous one, so an earlier stage may already
    compute the next batch.

    Args:
        model: this rank's shard.
        batch: the tokens to compute; the same on all tensor- and pipeline-parallel ranks.
        cached: the attention that reads and writes the KV cache of this rank's layers.

    Returns:
        The hidden states of the model on the last stage, None on the others.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if not model.pre_process:
        shape = (model.num_input_rows(batch), 1, model.config.hidden_size)
        received = torch.empty(shape, dtype=model.config.pipeline_dtype, device=batch.token_ids.device)
        dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank(), group=pipeline)
        model.set_input_tensor([received])
    output = model(batch, cached)
    if model.post_process:
        return output
    dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group=pipeline)
    return None


def broadcast_from_last_stage(values: Tensor) -> None:
    """Broadcast a tensor in place from the output rank to all tensor- and pipeline-parallel ranks; all of them call it.

    The tensor-parallel ranks of the last stage hold equal logits, but they must not sample independently: on a GPU, the
    cumulative sums of two ranks can differ, and the ranks would continue with different tokens.
    """
    replica = parallel_state.get_model_parallel_group()
    if replica.size() > 1:
        # Ranks are ordered by stage, then by tensor-parallel rank: this is the first rank of the last stage.
        output_rank = dist.get_process_group_ranks(replica)[-parallel_state.get_tensor_model_parallel_world_size()]
        assert (dist.get_rank() == output_rank) == mesh.is_loss_rank()
        dist.broadcast(values, output_rank, group=replica)
