"""Prefill of the in-process engine: prompts are computed once, and their keys and values stored in a KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.context_shard import shard_for_rank
from megatron_vcr1.model.kv_cache import KVCache, PrefillAttention
from megatron_vcr1.model.packed_batch import pack
from megatron_vcr1.model.video_language_model import VideoLanguageModel
from megatron_vcr1.parallel import mesh
from megatron_vcr1.rollout.engine import GenerationRequest
from megatron_vcr1.rollout.local.stages import forward_through_stages

# Maximum number of prompt tokens that a rank computes in one pass: enough to fill a GPU. A longer prompt gets a pass of
# its own.
PREFILL_TOKENS = 16384


def prefill(
    model: VideoLanguageModel, requests: Sequence[GenerationRequest], cache: KVCache | None
) -> tuple[Tensor | None, Tensor]:
    """Compute the prompts of requests. All ranks of the replica must call it together.

    Under context parallelism the ranks compute a part of every prompt each. All of them gather the keys and values; the
    rank that decodes the responses stores them.

    Args:
        model: this rank's shard.
        requests: the requests whose responses are decoded together.
        cache: the cache of their responses; None on context-parallel ranks that do not decode them.

    Returns:
        The hidden state of each prompt's last token, [requests, hidden_size], on the last stage, None on the others;
        and the position of the token after each prompt, int64 [requests].
    """
    hidden, positions = [], []
    # `pack` expects at least one response token per prompt. A single token adds nothing to the computation (the last
    # token of a response is not computed), and makes the prompt's last token a predicting position.
    one_token = torch.zeros(1, dtype=torch.long)
    for indices in _passes([len(request.prompt.token_ids) for request in requests]):
        groups = [Group(requests[index].id, requests[index].prompt, (one_token,)) for index in indices]
        packed = pack(groups, model.model_config)
        # All three mRoPE axes continue from the largest position of the last prompt token.
        positions.append(packed.position_ids[:, packed.predicting_token_indices].amax(0) + 1)
        batch = shard_for_rank(packed, model.model_config).to(mesh.device())
        plan = None if batch.context is None else batch.context.keys
        output = forward_through_stages(model, batch, PrefillAttention(batch.layout, cache, indices, plan=plan))
        if output is not None:
            hidden.append(batch.gather_targets(output))
    return torch.cat(hidden) if hidden else None, torch.cat(positions).to(mesh.device())


def _passes(lengths: Sequence[int]) -> Iterator[range]:
    """Yield the indices of the prompts that are computed in the same pass.

    Args:
        lengths: tokens of each prompt.
    """
    first, num_tokens = 0, 0
    for index, length in enumerate(lengths):
        if index > first and num_tokens + length > PREFILL_TOKENS * mesh.context_size():
            yield range(first, index)
            first, num_tokens = index, 0
        num_tokens += length
    yield range(first, len(lengths))
