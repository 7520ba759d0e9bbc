"""Packing of groups of responses into microbatches with a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from megatron_vcr1.data.encoding import EncodedPrompt


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and its responses, which share the prompt in the packed sequence.

    Attributes:
        id: id of the sample.
        prompt: the encoded prompt, P tokens.
        responses: token ids of each response, int64 [response_tokens]; one response for SFT, G for GRPO.
    """

    id: str
    prompt: EncodedPrompt
    responses: tuple[Tensor, ...]

    @property
    def num_tokens(self) -> int:
        """Number of tokens in the packed sequence: the prompt once, then every response."""
        return len(self.prompt.token_ids) + sum(len(response) for response in self.responses)


AnyGroup = TypeVar("AnyGroup", bound=Group)


def pack_groups(groups: Sequence[AnyGroup], max_tokens: int) -> list[tuple[AnyGroup, ...]]:
    """Pack groups into few microbatches by best-fit decreasing. A group is never split.

    Groups are placed from the longest to the shortest, each into the microbatch with the least space that still holds
    it; a tie goes to the earlier microbatch. The result depends only on the sizes and the order of the groups, so that
    all ranks of a replica pack in the same way. Groups keep their order within a microbatch, and microbatches are
    ordered by their first group.

    Args:
        groups: groups to pack.
        max_tokens: token budget of a microbatch. A group that is longer gets a microbatch of its own.
    """
    sizes = [group.num_tokens for group in groups]
    longest_first = sorted(range(len(groups)), key=lambda index: (-sizes[index], index))
    microbatches: list[list[int]] = []
    free_tokens: list[int] = []
    for index in longest_first:
        num_tokens = sizes[index]
        fitting = [slot for slot, free in enumerate(free_tokens) if free >= num_tokens]
        if fitting:
            slot = min(fitting, key=lambda fit: free_tokens[fit])
        else:
            slot = len(microbatches)
            microbatches.append([])
            free_tokens.append(max_tokens)
        microbatches[slot].append(index)
        free_tokens[slot] -= num_tokens
    in_order = sorted(sorted(microbatch) for microbatch in microbatches)
    return [tuple(groups[index] for index in microbatch) for microbatch in in_order]
