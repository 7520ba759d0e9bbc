"""A rank's part of a microbatch under context parallelism: its tokens and its targets.

Prompts are cut in zigzag: into 2N parts of equal length, of which rank r has the parts r and 2N - 1 - r. So all ranks
have equally many tokens, and the causal attention of their two parts costs the same: the early part has few keys, the
late one many. (One part per rank, cut by FLOPs, would balance compute too, but not memory: the first rank would have
the most tokens.) Responses are whole on one rank, dealt from the longest to the shortest. The first token of a response
is predicted by the last token of its prompt. A rank that has responses, but not this token, computes it once more, as a
query without key, rather than receive its hidden state.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from vcr1_kernels import SegmentLayout

from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig, VisionConfig
from megatron_vcr1.model.frame_shares import divide_frames, share_frames
from megatron_vcr1.model.packed_batch import ContextShard, PackedBatch, pack
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.balance import longest_first
from megatron_vcr1.parallel.context import KeyGather


def shard_batch(
    batch: PackedBatch,
    vision: VisionConfig,
    *,
    rank: int,
    num_ranks: int,
    tensor_rank: int = 0,
    num_tensor_ranks: int = 1,
    pad_to_multiple_of: int = 1,
) -> PackedBatch:
    """Return the part of a microbatch that a context-parallel rank computes. No rank communicates with another.

    Args:
        batch: the whole microbatch, without padding.
        vision: the model's vision tower, for the number of tokens of a temporal step.
        rank: index of the context-parallel rank.
        num_ranks: number of context-parallel ranks.
        tensor_rank, num_tensor_ranks: as for `divide_frames`.
        pad_to_multiple_of: the number of tokens is padded to a multiple of this.
    """
    sharder = _Sharder(batch, rank, num_ranks)
    inputs, share = divide_frames(
        batch.vision,
        vision,
        sharder.vision_features(),
        context_rank=rank,
        tensor_rank=tensor_rank,
        num_tensor_ranks=num_tensor_ranks,
    )
    return replace(sharder.shard(pad_to_multiple_of), vision=inputs, frames=share)


def pack_for_rank(groups: Sequence[Group], config: ModelConfig, *, pad_to_multiple_of: int = 1) -> PackedBatch:
    """Pack groups into a microbatch, and return the part of it that this rank computes.

    The ranks of a replica must pack the same groups. The arguments are `pack`'s.
    """
    padding = pad_to_multiple_of if mesh.context_size() == 1 else 1  # otherwise each rank's part is padded
    packed = pack(groups, config, pad_to_multiple_of=padding)
    return shard_for_rank(packed, config, pad_to_multiple_of=pad_to_multiple_of)


def shard_for_rank(batch: PackedBatch, config: ModelConfig, *, pad_to_multiple_of: int = 1) -> PackedBatch:
    """Return the part of a microbatch that this rank computes: all of its tokens without context parallelism.

    Args:
        batch: the microbatch; with context parallelism without padding, otherwise with it.
        config: the model's configuration.
        pad_to_multiple_of: the number of tokens of a context-parallel rank's part is padded to a multiple of this.
    """
    if mesh.context_size() == 1:
        assert len(batch.token_ids) % pad_to_multiple_of == 0
        return share_frames(batch, config.vision)
    return shard_batch(
        batch,
        config.vision,
        rank=mesh.context_rank(),
        num_ranks=mesh.context_size(),
        tensor_rank=mesh.frame_rank(),
        num_tensor_ranks=mesh.num_frame_ranks(),
        pad_to_multiple_of=pad_to_multiple_of,
    )


def zigzag_ranges(length: int, rank: int, num_ranks: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the two ranges of a prompt's tokens that a rank has.

    The first parts are one token longer if the length is not a multiple of the number of parts. No rank has more than
    ceil(length / num_ranks) tokens.
    """
    size, longer = divmod(length, 2 * num_ranks)
    early, late = (
        (part * size + min(part, longer), (part + 1) * size + min(part + 1, longer))
        for part in (rank, 2 * num_ranks - 1 - rank)
    )
    return early, late


@dataclass(frozen=True)
class _Prompt:
    """A prompt of a microbatch: its segment, the range of its tokens, and its first key (all prompts come first)."""

    segment: int
    start: int
    end: int
    first_key: int


class _Sharder:
    """The tokens of every rank, from which this rank's plans follow. "Global" counts tokens of the whole microbatch."""

    def __init__(self, batch: PackedBatch, rank: int, num_ranks: int) -> None:
        self.batch, self.rank, self.num_ranks = batch, rank, num_ranks
        layout = batch.layout
        segments = [segment for segment, prefix in enumerate(layout.prefixes) if prefix < 0]
        first_keys = accumulate((layout.lengths[segment] for segment in segments), initial=0)
        self.prompts = [
            _Prompt(segment, layout.starts[segment], layout.starts[segment + 1], first_key)
            for segment, first_key in zip(segments, first_keys, strict=False)
        ]
        self.num_prompt_tokens = sum(prompt.end - prompt.start for prompt in self.prompts)
        responses = [segment for segment, prefix in enumerate(layout.prefixes) if prefix >= 0]
        # The targets' number rather than the tokens', which leaves out the last one: it is never 0.
        owners = longest_first(batch.response_lengths, num_ranks)
        self.owners = dict(zip(responses, owners, strict=True))
        # For each rank, its tokens of prompts, and the last tokens of prompts that it computes in addition.
        self.prompt_tokens = [self._prompt_tokens(other) for other in range(num_ranks)]
        self.repeated_tokens = [self._repeated_tokens(other) for other in range(num_ranks)]

    def _prompt_tokens(self, rank: int) -> Tensor:
        return _concatenate(
            torch.arange(prompt.start + first, prompt.start + last)
            for prompt in self.prompts
            for first, last in zigzag_ranges(prompt.end - prompt.start, rank, self.num_ranks)
        )

    def _repeated_tokens(self, rank: int) -> Tensor:
        layout = self.batch.layout
        with_responses = {layout.prefixes[segment] for segment, owner in self.owners.items() if owner == rank}
        last_tokens = torch.tensor(
            [prompt.end - 1 for prompt in self.prompts if prompt.segment in with_responses], dtype=torch.long
        )
        return last_tokens[~torch.isin(last_tokens, self.prompt_tokens[rank])]

    def shard(self, pad_to_multiple_of: int) -> PackedBatch:
        """Return this rank's part without vision inputs."""
        batch, layout = self.batch, self.batch.layout
        own = [segment for segment, owner in self.owners.items() if owner == self.rank]
        own_tokens = _concatenate(torch.arange(*layout.starts[segment : segment + 2]) for segment in own)
        head = torch.cat((self.prompt_tokens[self.rank], self.repeated_tokens[self.rank]))
        tokens = torch.cat((head, own_tokens))
        # Layers need at least one token.
        padding = -len(tokens) % pad_to_multiple_of if len(tokens) else pad_to_multiple_of
        local_index = torch.full((layout.num_tokens,), -1)
        local_index[tokens] = torch.arange(len(tokens))
        target_indices = self._target_indices(own)
        is_vision = torch.isin(head, batch.vision_token_indices)
        return PackedBatch(
            token_ids=torch.nn.functional.pad(batch.token_ids[tokens], (0, padding)),
            position_ids=torch.nn.functional.pad(batch.position_ids[:, tokens], (0, padding)),
            layout=self._layout(own, len(own_tokens) + padding, padding),
            vision=(),
            vision_token_indices=is_vision.nonzero()[:, 0],
            predicting_token_indices=local_index[batch.predicting_token_indices[target_indices]],
            target_ids=batch.target_ids[target_indices],
            response_lengths=tuple(
                length for length, segment in zip(batch.response_lengths, self.owners, strict=True) if segment in own
            ),
            context=ContextShard(
                keys=self._key_gather(len(head)),
                target_indices=target_indices,
                num_targets=len(batch.target_ids),
                layout=layout,
            ),
        )

    def _target_indices(self, own: Sequence[int]) -> Tensor:
        """Return the indices of the targets of this rank's responses among all targets of the microbatch."""
        ends = accumulate(self.batch.response_lengths)
        ranges = {
            segment: torch.arange(end - length, end)
            for segment, length, end in zip(self.owners, self.batch.response_lengths, ends, strict=True)
        }
        return _concatenate(ranges[segment] for segment in own)

    def _layout(self, own: Sequence[int], num_own_tokens: int, padding: int) -> SegmentLayout:
        """Return the segments of this rank's keys (all prompts, own responses, padding) and the ranges of its queries.

        Args:
            num_own_tokens: tokens of own responses and padding.
        """
        layout = self.batch.layout
        index = {prompt.segment: number for number, prompt in enumerate(self.prompts)}
        queries = [
            (prompt.first_key + first, prompt.first_key + last)
            for prompt in self.prompts
            for first, last in zigzag_ranges(prompt.end - prompt.start, self.rank, self.num_ranks)
        ]
        keys_of_last_tokens = {
            prompt.end - 1: prompt.first_key + prompt.end - 1 - prompt.start for prompt in self.prompts
        }
        repeated = [keys_of_last_tokens[token] for token in self.repeated_tokens[self.rank].tolist()]
        queries += [(key, key + 1) for key in repeated]
        queries.append((self.num_prompt_tokens, self.num_prompt_tokens + num_own_tokens))
        return SegmentLayout(
            (*(prompt.end - prompt.start for prompt in self.prompts), *(layout.lengths[s] for s in own), padding),
            (*(-1 for _ in self.prompts), *(index[layout.prefixes[segment]] for segment in own), -1),
            queries=tuple((start, end) for start, end in queries if start < end),
        )

    def _key_gather(self, own_start: int) -> KeyGather:
        slots = max(map(len, self.prompt_tokens))
        rows_of_tokens = torch.empty(self.batch.layout.num_tokens, dtype=torch.long)
        for rank, tokens in enumerate(self.prompt_tokens):
            rows_of_tokens[tokens] = torch.arange(len(tokens)) + rank * slots
        rows = _concatenate(rows_of_tokens[prompt.start : prompt.end] for prompt in self.prompts)
        return KeyGather(len(self.prompt_tokens[self.rank]), slots, rows, own_start)

    def vision_features(self) -> list[Tensor]:
        """Return for each rank the features of its tokens of prompts, as indices among all vision features."""
        feature_of_token = torch.full((self.batch.layout.num_tokens,), -1)
        feature_of_token[self.batch.vision_token_indices] = torch.arange(len(self.batch.vision_token_indices))
        heads = map(torch.cat, zip(self.prompt_tokens, self.repeated_tokens, strict=True))
        found = [feature_of_token[head] for head in heads]
        return [features[features >= 0] for features in found]


def _concatenate(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat((torch.empty(0, dtype=torch.long), *tensors))
