"""Groups of responses to microbatches of a bounded number of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from megatron_vcr1.data.encoding import EncodedPrompt
from megatron_vcr1.errors import UserError


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt and the responses to it, which share it in the packed sequence.

    Attributes:
        id: the sample's.
        prompt: with P tokens.
        responses: int64 [response_tokens] each; SFT has one, GRPO the group's G.
    """

    id: str
    prompt: EncodedPrompt
    responses: tuple[Tensor, ...]

    @property
    def num_tokens(self) -> int:
        """Rows in the packed sequence: the prompt once, then every response."""
        return len(self.prompt.token_ids) + sum(len(response) for response in self.responses)


AnyGroup = TypeVar("AnyGroup", bound=Group)


def pack_groups(groups: Sequence[AnyGroup], max_tokens: int) -> list[tuple[AnyGroup, ...]]:
    """Distributes groups over as few microbatches as best-fit decreasing finds; none is split.

    The result depends on the groups' sizes and order alone: the longest group first goes into the microbatch that it
    fills most, ties to the earlier one. Within a microbatch, and by their first group, all keep the given order.

    Args:
        max_tokens: most tokens of a microbatch.

    Raises:
        UserError: a group alone is over the budget; names it and the way out.
    """
    sizes = [group.num_tokens for group in groups]
    for group, num_tokens in zip(groups, sizes, strict=True):
        if num_tokens > max_tokens:
            num_prompt_tokens = len(group.prompt.token_ids)
            raise UserError(
                f"sample {group.id}: {num_prompt_tokens} prompt tokens and {num_tokens - num_prompt_tokens} of "
                f"{len(group.responses)} responses do not fit into a microbatch of {max_tokens} tokens; allow more, "
                "or lower the video's pixels, the response length or the group size"
            )
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
