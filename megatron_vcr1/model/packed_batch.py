"""A microbatch: groups of one prompt and its responses, packed one behind the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vcr1_kernels import SegmentLayout

from megatron_vcr1.data.encoding import EncodedPrompt, VisionInput
from megatron_vcr1.data.packing import Group
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.mrope import prompt_positions, vision_token_mask


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """The rows that the model computes, and which of them predict what.

    A prompt stands once, whatever the number of its responses. The last token of a response is predicted but never fed,
    so a response of R tokens takes R - 1 rows, and a group takes P + sum(R_i - 1).
    """

    token_ids: Tensor  # int64 [rows]
    position_ids: Tensor  # int64 [3, rows]
    layout: SegmentLayout  # prompts, and responses behind them
    vision: tuple[VisionInput, ...]  # of all prompts, in row order
    vision_token_indices: Tensor  # int64 [vision tokens]: rows whose embedding is replaced by a vision feature
    predicting_token_indices: Tensor  # int64 [targets]: the row whose hidden state predicts each response token
    target_ids: Tensor  # int64 [targets]
    response_lengths: tuple[int, ...]  # targets of each response, in order; sum = targets

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch with its index tensors on a device; frames stay until the vision tower reads them."""
        return PackedBatch(
            token_ids=self.token_ids.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            layout=self.layout,
            vision=self.vision,
            vision_token_indices=self.vision_token_indices.to(device, non_blocking=True),
            predicting_token_indices=self.predicting_token_indices.to(device, non_blocking=True),
            target_ids=self.target_ids.to(device, non_blocking=True),
            response_lengths=self.response_lengths,
        )


def pack(groups: Sequence[Group], config: ModelConfig, *, pad_to_multiple_of: int = 1) -> PackedBatch:
    """Pack groups into one microbatch.

    Args:
        groups: prompts and their responses, of at least one token each.
        config: for the vision pads and the positions' time scale.
        pad_to_multiple_of: the rows are padded to a multiple of this (`QwenVLModel.token_multiple`) by a segment that
            nothing attends to and that predicts nothing.

    Raises:
        ValueError: a prompt or a response without tokens, or pads that do not fit the prompt's images and videos; names
            the group.
    """
    packer = _Packer(config)
    for group in groups:
        try:
            packer.add(group.prompt, group.responses)
        except ValueError as error:
            raise ValueError(f"sample {group.id}: {error}") from error
    packer.pad(pad_to_multiple_of)
    return packer.finish()


class _Packer:
    """Rows gathered so far; `num_tokens` is where the next segment starts."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.pad_ids = frozenset((config.image_token_id, config.video_token_id))
        self.num_tokens = 0
        self.token_ids: list[Tensor] = []
        self.position_ids: list[Tensor] = []
        self.lengths: list[int] = []
        self.prefixes: list[int] = []
        self.vision: list[VisionInput] = []
        self.vision_token_indices: list[Tensor] = []
        self.predicting_token_indices: list[Tensor] = []
        self.target_ids: list[Tensor] = []

    def _segment(self, token_ids: Tensor, position_ids: Tensor, prefix: int) -> None:
        self.token_ids.append(token_ids)
        self.position_ids.append(position_ids)
        self.lengths.append(len(token_ids))
        self.prefixes.append(prefix)
        self.num_tokens += len(token_ids)

    def add(self, prompt: EncodedPrompt, responses: Sequence[Tensor]) -> None:
        if not len(prompt.token_ids) or any(not len(response) for response in responses):
            raise ValueError("a prompt and each of its responses need at least one token")
        positions = prompt_positions(
            prompt.token_ids,
            [(item.grid_thw, item.seconds_per_grid) for item in prompt.vision],
            vision_token_ids=self.pad_ids,
            merge_size=self.config.vision.merge_size,
            tokens_per_second=self.config.vision.tokens_per_second,
        )
        self.vision.extend(prompt.vision)
        self.vision_token_indices.append(
            vision_token_mask(prompt.token_ids, self.pad_ids).nonzero()[:, 0] + self.num_tokens
        )
        prompt_index = len(self.lengths)
        self._segment(prompt.token_ids, positions, prefix=-1)
        last_prompt_row = self.num_tokens - 1
        next_position = int(positions.max()) + 1
        for response in responses:
            fed = response[:-1]
            rows = torch.arange(self.num_tokens, self.num_tokens + len(fed))
            self.predicting_token_indices.append(torch.cat((torch.tensor([last_prompt_row]), rows)))
            self.target_ids.append(response)
            self._segment(fed, (torch.arange(len(fed)) + next_position).expand(3, -1), prefix=prompt_index)

    def pad(self, multiple: int) -> None:
        padding = -self.num_tokens % multiple
        if padding:
            self._segment(torch.zeros(padding, dtype=torch.long), torch.zeros(3, padding, dtype=torch.long), prefix=-1)

    def finish(self) -> PackedBatch:
        empty = torch.empty(0, dtype=torch.long)
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
