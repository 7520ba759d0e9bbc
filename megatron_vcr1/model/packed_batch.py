"""A microbatch: groups of a prompt and its responses in one packed sequence without padding between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from vcr1_kernels import SegmentLayout

from megatron_vcr1.data.encoding import EncodedPrompt, VisionInput
from megatron_vcr1.data.packing import Group
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.mrope import check_positions, prompt_positions, vision_token_mask
from megatron_vcr1.model.vision_features import FeatureMemo
from megatron_vcr1.parallel.context import KeyGather, sum_over_context_ranks
from megatron_vcr1.parallel.feature_exchange import FeatureExchange


@dataclass(frozen=True, slots=True)
class ContextShard:
    """How a context-parallel rank's part of a microbatch relates to the whole (`model.context_shard`).

    Attributes:
        keys: the plan by which the ranks gather the keys and values of prompts.
        target_indices: int64 [targets of this rank]; their indices among all targets of the microbatch.
        num_targets: targets of the microbatch, of all ranks together.
        layout: the segments of the microbatch.
    """

    keys: KeyGather
    target_indices: Tensor
    num_targets: int
    layout: SegmentLayout

    def to(self, device: torch.device) -> ContextShard:
        """Return the plans with their index tensors on a device."""
        return replace(
            self,
            keys=self.keys.to(device),
            target_indices=self.target_indices.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True)
class FrameShare:
    """How the frames that a rank encodes relate to all frames of a microbatch (`model.frame_shares`).

    Attributes:
        exchange: the plan by which vision features reach the ranks of their tokens.
        grids: patches in time, height and width of all images and videos of the microbatch.
    """

    exchange: FeatureExchange
    grids: tuple[tuple[int, int, int], ...]

    def to(self, device: torch.device) -> FrameShare:
        """Return the plan with its index tensors on a device."""
        return replace(self, exchange=self.exchange.to(device))


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The tokens of a packed sequence, and the targets that some of them predict.

    Under context parallelism, these are the tokens and targets of one rank, and `context` describes the others. If the
    ranks share the frames, `vision` has those that this rank encodes, and `frames` describes the others.

    A prompt is in the sequence once, however many responses it has. The last token of a response is a target but not an
    input, so a response of R tokens adds R - 1 tokens, and a group has P + sum(R_i - 1) tokens.
    """

    token_ids: Tensor  # int64 [tokens]
    position_ids: Tensor  # int64 [3, tokens]
    layout: SegmentLayout  # the segments: each prompt, followed by its responses
    vision: tuple[VisionInput, ...]  # images and videos of all prompts, in packing order
    vision_token_indices: Tensor  # int64 [vision tokens]: tokens whose embedding is replaced by a vision feature
    predicting_token_indices: Tensor  # int64 [targets]: the token whose hidden state predicts each target
    target_ids: Tensor  # int64 [targets]: the response tokens
    response_lengths: tuple[int, ...]  # targets of each response, in order; they sum to the number of targets
    context: ContextShard | None = None
    frames: FrameShare | None = None
    memo: FeatureMemo | None = None  # keeps the vision features for further forward passes
    # The vision token indices in host memory, where sizes that depend on them are computed without a GPU sync.
    host_vision_token_indices: Tensor | None = None

    def to(self, device: torch.device) -> PackedBatch:
        """Return the batch with its index tensors on a device. Frames move when the vision tower reads them."""
        return PackedBatch(
            token_ids=self.token_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            layout=self.layout,
            vision=self.vision,
            vision_token_indices=self.vision_token_indices.to(device, non_blocking=True),
            predicting_token_indices=self.predicting_token_indices.to(device, non_blocking=True),
            target_ids=self.target_ids.to(device, non_blocking=True),
            response_lengths=self.response_lengths,
            context=None if self.context is None else self.context.to(device),
            frames=None if self.frames is None else self.frames.to(device),
            memo=self.memo,
            host_vision_token_indices=self._host_indices,
        )

    @property
    def grids(self) -> tuple[tuple[int, int, int], ...]:
        """Patches in time, height and width of all images and videos, on whichever ranks they are."""
        return tuple(item.grid_thw for item in self.vision) if self.frames is None else self.frames.grids

    @property
    def _host_indices(self) -> Tensor:
        host = self.host_vision_token_indices
        return self.vision_token_indices if host is None else host

    def vision_tokens_in(self, start: int, stop: int) -> slice:
        """Return which of the vision tokens are among the tokens [start, stop)."""
        return slice(*torch.searchsorted(self._host_indices, torch.tensor([start, stop])).tolist())

    def select_targets(self, values: Tensor) -> Tensor:
        """Return the values of this rank's targets: [targets of the microbatch] -> [targets]."""
        return values if self.context is None else values[self.context.target_indices.to(values.device)]

    def gather_targets(self, values: Tensor) -> Tensor:
        """Return the values of all targets of the microbatch, [targets] -> [targets of the microbatch].

        All context-parallel ranks must call it, and all of them receive the result.
        """
        if self.context is None:
            return values
        whole = values.new_zeros(self.context.num_targets, *values.shape[1:])
        whole[self.context.target_indices] = values
        return sum_over_context_ranks(whole)


def pack(groups: Sequence[Group], config: ModelConfig, *, pad_to_multiple_of: int = 1) -> PackedBatch:
    """Pack groups into one microbatch.

    Args:
        groups: prompts and their responses, of at least one token each.
        config: configuration of the model: ids of the vision pads, and parameters of the mRoPE positions.
        pad_to_multiple_of: the number of tokens is padded to a multiple of this (`VideoLanguageModel.token_multiple`).
            The padding is a segment that nothing attends to and that predicts nothing.

    Raises:
        ValueError: a prompt or a response has no tokens, or the vision pads do not match the prompt's images and
            videos; the message names the sample.
        UserError: a sample's rotary positions are beyond the model's range.
    """
    packer = _Packer(config)
    for group in groups:
        try:
            packer.add(group.prompt, group.responses)
        except UserError as error:
            raise UserError(f"sample {group.id}: {error}") from error
        except ValueError as error:
            raise ValueError(f"sample {group.id}: {error}") from error
    packer.pad(pad_to_multiple_of)
    return packer.finish()


class _Packer:
    """A packed sequence under construction. `num_tokens` is the index at which the next segment starts."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.num_tokens = 0
        self.token_ids: list[Tensor] = []
        self.position_ids: list[Tensor] = []
        self.lengths: list[int] = []
        self.prefixes: list[int] = []
        self.vision: list[VisionInput] = []
        self.vision_token_indices: list[Tensor] = []
        self.predicting_token_indices: list[Tensor] = []
        self.target_ids: list[Tensor] = []

    def _add_segment(self, token_ids: Tensor, position_ids: Tensor, prefix: int) -> None:
        """Append a segment; `prefix` is the index of the segment that it attends to as well, or -1."""
        self.token_ids.append(token_ids)
        self.position_ids.append(position_ids)
        self.lengths.append(len(token_ids))
        self.prefixes.append(prefix)
        self.num_tokens += len(token_ids)

    def add(self, prompt: EncodedPrompt, responses: Sequence[Tensor]) -> None:
        """Append a prompt and its responses: a segment for the prompt, then a segment for each response."""
        if not len(prompt.token_ids) or any(not len(response) for response in responses):
            raise ValueError("a prompt and each of its responses need at least one token")
        positions = prompt_positions(self.config, prompt)
        check_positions(self.config, positions, max((len(response) - 1 for response in responses), default=0))
        self.vision.extend(prompt.vision)
        # Only the prompt's pads: a response may contain the same ids as ordinary tokens.
        is_vision = vision_token_mask(prompt.token_ids, self.config.pad_ids)
        self.vision_token_indices.append(is_vision.nonzero()[:, 0] + self.num_tokens)
        prompt_segment = len(self.lengths)
        self._add_segment(prompt.token_ids, positions, prefix=-1)
        last_prompt_token = self.num_tokens - 1
        next_position = int(positions.max()) + 1
        for response in responses:
            inputs = response[:-1]
            indices = torch.arange(self.num_tokens, self.num_tokens + len(inputs))
            # The prompt's last token predicts the first token of every response.
            self.predicting_token_indices.append(torch.cat((torch.tensor([last_prompt_token]), indices)))
            self.target_ids.append(response)
            response_positions = (torch.arange(len(inputs)) + next_position).expand(3, -1)
            self._add_segment(inputs, response_positions, prefix=prompt_segment)

    def pad(self, multiple: int) -> None:
        """Append a segment of padding, unless the number of tokens is a multiple of `multiple` already."""
        padding = -self.num_tokens % multiple
        if padding:
            token_ids = torch.zeros(padding, dtype=torch.long)
            self._add_segment(token_ids, torch.zeros(3, padding, dtype=torch.long), prefix=-1)

    def finish(self) -> PackedBatch:
        """Concatenate everything that was added."""
        empty = torch.empty(0, dtype=torch.long)  # torch.cat refuses an empty list
        return PackedBatch(
            token_ids=torch.cat(self.token_ids),
            position_ids=torch.cat(self.position_ids, dim=1),
            layout=SegmentLayout(tuple(self.lengths), tuple(self.prefixes)),
            vision=tuple(self.vision),
            vision_token_indices=torch.cat([empty, *self.vision_token_indices]),
            predicting_token_indices=torch.cat([empty, *self.predicting_token_indices]),
            target_ids=torch.cat([empty, *self.target_ids]),
            response_lengths=tuple(len(response) for response in self.target_ids),
        )
