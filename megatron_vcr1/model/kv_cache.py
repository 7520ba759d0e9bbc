"""The KV cache of generation: the keys and values of each prompt once, and those of every response after it.

All responses of a group read the same prompt keys. `KVCache.attend` therefore computes attention in two parts:

1. Prompt part: the queries of a group's responses are stacked and attend to the prompt in one matmul, as if they were
   one sequence of many queries.
2. Response part: each response attends to its own few tokens. All responses decode in step, so they have the same
   number of tokens and one batched matmul serves them all.

The two outputs are combined with their log-sum-exps, as in vcr1_kernels' shared-prefix attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vcr1_kernels import SegmentLayout, shared_prefix_attention

from megatron_vcr1.model.context_attention import forward_across_ranks
from megatron_vcr1.parallel.context import KeyGather

# The capacity for response tokens starts here and doubles when it is full: most responses end long before the limit.
_FIRST_CAPACITY = 64
# Prompt keys are padded to a multiple of this, as GPU attention with a mask requires.
_LENGTH_MULTIPLE = 16


@dataclass
class _Layer:
    """The cached keys and values of one layer; heads come before tokens, as batched matmuls need them."""

    prompt_keys: Tensor  # [groups, kv_heads, longest_prompt, head_dim], zero after a prompt's end
    prompt_values: Tensor
    response_keys: Tensor  # [responses, kv_heads, capacity, head_dim]
    response_values: Tensor


class KVCache:
    """Keys and values of the responses that decode together and of their groups' prompts, for this rank's layers.

    Fill it by running the model on the prompts with a `PrefillAttention`. Then run the model on one new token per
    response and pass with the cache itself as the attention, and call `advance` after each pass.
    """

    def __init__(
        self,
        prompt_lengths: Sequence[int],
        response_groups: Sequence[int],
        max_response_tokens: int,
        device: torch.device,
    ) -> None:
        """Prepare an empty cache; memory is allocated as layers store into it.

        Args:
            prompt_lengths: number of tokens of each group's prompt.
            response_groups: group index of each response, ascending.
            max_response_tokens: the most tokens that a response will ever have in the cache.
            device: device of the keys and values.
        """
        self.num_response_tokens = 0  # tokens of each response that all layers have stored
        self._max_response_tokens = max_response_tokens
        self.device = device
        self._layers: dict[int, _Layer] = {}
        self._index_responses(list(prompt_lengths), list(response_groups))

    def _index_responses(self, prompt_lengths: list[int], response_groups: list[int]) -> None:
        """Compute where each response's query is in the padded table [groups, width] of the prompt part.

        Width is the size of the largest group. Unused cells of smaller groups repeat response 0, and their results are
        dropped.
        """
        self.prompt_lengths, self.response_groups = prompt_lengths, response_groups
        self.longest_prompt = -(-max(prompt_lengths) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        members: list[list[int]] = [[] for _ in prompt_lengths]
        for response, group in enumerate(response_groups):
            members[group].append(response)
        self._width = max(map(len, members))
        self._response_of_cell: Tensor | None = None  # [groups * width]; None: the table is the responses in order
        self._cell_of_response: Tensor | None = None  # [responses]
        if any(len(responses) < self._width for responses in members):
            table = [responses + [0] * (self._width - len(responses)) for responses in members]
            cells = [
                group * self._width + place
                for group, responses in enumerate(members)
                for place in range(len(responses))
            ]
            self._response_of_cell = torch.tensor(table, device=self.device).flatten()
            self._cell_of_response = torch.tensor(cells, device=self.device)
        self._mask: Tensor | None = None  # 0 or -inf, [groups, 1, 1, longest_prompt]
        if min(prompt_lengths) < self.longest_prompt:
            is_padding = torch.arange(self.longest_prompt) >= torch.tensor(prompt_lengths)[:, None]
            mask = torch.zeros(is_padding.shape).masked_fill(is_padding, -torch.inf)
            self._mask = mask[:, None, None].to(self.device)

    def store_prompt(self, layer_number: int, key: Tensor, value: Tensor, groups: Tensor, positions: Tensor) -> None:
        """Store a layer's keys and values of prompt tokens.

        Args:
            layer_number: the layer.
            key, value: [tokens, kv_heads, head_dim].
            groups: int64 [tokens], the group of each token.
            positions: int64 [tokens], the index of each token in its prompt.
        """
        if layer_number not in self._layers:
            _, num_kv_heads, head_dim = key.shape
            prompt_shape = (len(self.prompt_lengths), num_kv_heads, self.longest_prompt, head_dim)
            response_shape = (len(self.response_groups), num_kv_heads, 0, head_dim)
            self._layers[layer_number] = _Layer(
                key.new_zeros(prompt_shape),
                key.new_zeros(prompt_shape),
                key.new_empty(response_shape),
                key.new_empty(response_shape),
            )
        layer = self._layers[layer_number]
        layer.prompt_keys[groups, :, positions] = key
        layer.prompt_values[groups, :, positions] = value

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Store the key and value of one new token per response, and attend to the prompt and the response.

        Call `advance` after the last layer.

        Args:
            layer_number: the layer.
            query: [responses, heads, head_dim].
            key, value: [responses, kv_heads, head_dim].
            scale: factor of the scores; None for head_dim ** -0.5.

        Returns:
            [responses, heads, head_dim].
        """
        num_responses, num_heads, head_dim = query.shape
        num_kv_heads = key.shape[1]
        layer = self._layers[layer_number]
        self._store_response_tokens(layer, key, value)
        num_tokens = self.num_response_tokens + 1  # `advance` counts the new token only after the last layer
        # Grouped-query attention: the query heads that share a key-value head become rows of one matmul.
        grouped = query.reshape(num_responses, num_kv_heads, -1, head_dim)
        response_output, response_lse = _partial_attention(
            grouped, layer.response_keys[:, :, :num_tokens], layer.response_values[:, :, :num_tokens], None, scale
        )
        table = grouped if self._response_of_cell is None else grouped[self._response_of_cell]
        # [groups * width, kv_heads, queries, head_dim] -> [groups, kv_heads, width * queries, head_dim]
        table = table.unflatten(0, (-1, self._width)).transpose(1, 2).flatten(2, 3)
        mask = None if self._mask is None else self._mask.to(query.dtype)
        output, lse = _partial_attention(table, layer.prompt_keys, layer.prompt_values, mask, scale)
        output = output.unflatten(2, (self._width, -1)).transpose(1, 2).flatten(0, 1)
        lse = lse.unflatten(2, (self._width, -1)).transpose(1, 2).flatten(0, 1)
        if self._cell_of_response is not None:
            output, lse = output[self._cell_of_response], lse[self._cell_of_response]
        # exp(lse) is the softmax denominator of a part, so the prompt part's weight is the sigmoid of the difference.
        weight = (lse - response_lse).sigmoid()[..., None]
        # In float32: half precision would round twice.
        combined = response_output.float().lerp(output.float(), weight)
        return combined.to(query.dtype).reshape(num_responses, num_heads, head_dim)

    def _store_response_tokens(self, layer: _Layer, key: Tensor, value: Tensor) -> None:
        capacity = layer.response_keys.shape[2]
        if self.num_response_tokens == capacity:
            extra = min(max(2 * capacity, _FIRST_CAPACITY), self._max_response_tokens) - capacity
            layer.response_keys, layer.response_values = (
                torch.cat((cached, cached.new_empty(*cached.shape[:2], extra, cached.shape[3])), dim=2)
                for cached in (layer.response_keys, layer.response_values)
            )
        layer.response_keys[:, :, self.num_response_tokens] = key
        layer.response_values[:, :, self.num_response_tokens] = value

    def advance(self) -> None:
        """Count the new token of each response, after every layer has stored it."""
        self.num_response_tokens += 1

    def keep_responses(self, responses: Sequence[int]) -> None:
        """Drop all other responses, and the prompts that have no response left.

        Args:
            responses: indices of the responses to keep, ascending; they are renumbered from 0.
        """
        groups = sorted({self.response_groups[response] for response in responses})
        response_index = torch.tensor(responses, device=self.device)
        group_index = torch.tensor(groups, device=self.device)
        lengths = [self.prompt_lengths[group] for group in groups]
        drops_prompts = len(groups) < len(self.prompt_lengths)
        self._index_responses(lengths, [groups.index(self.response_groups[response]) for response in responses])
        for layer in self._layers.values():
            layer.response_keys = layer.response_keys[response_index]
            layer.response_values = layer.response_values[response_index]
            if drops_prompts:  # the longest prompt may be gone, so the padding is cut too
                layer.prompt_keys = layer.prompt_keys[group_index, :, : self.longest_prompt]
                layer.prompt_values = layer.prompt_values[group_index, :, : self.longest_prompt]


class PrefillAttention:
    """The attention of a forward pass over whole packed prompts, which stores their keys and values in a cache.

    Under context parallelism the ranks compute a part of the prompts each, and one of them decodes the responses.
    """

    def __init__(
        self, layout: SegmentLayout, cache: KVCache | None, groups: range, *, plan: KeyGather | None = None
    ) -> None:
        """Prepare a pass.

        Args:
            layout: segments of the prompts.
            cache: receives the keys and values; None on the ranks that do not decode the responses.
            groups: the cache's groups whose prompts the pass computes, in packing order.
            plan: how the context-parallel ranks gather the keys; None without context parallelism.
        """
        self._layout, self._plan = layout, plan
        self._cache = cache
        if cache is not None:
            lengths = [cache.prompt_lengths[group] for group in groups]
            self._groups = torch.repeat_interleave(torch.tensor(groups), torch.tensor(lengths)).to(cache.device)
            self._positions = torch.cat([torch.arange(length) for length in lengths]).to(cache.device)

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Store the prompts' keys and values and return causal attention within each prompt; see CachedAttention."""
        if self._plan is None:
            output = shared_prefix_attention(query, key, value, self._layout, scale=scale)
        else:
            kept: list[Tensor] = []
            output, _ = forward_across_ranks(
                query, key, value, self._layout, self._plan, scale=scale, kept=None if self._cache is None else kept
            )
            if kept:
                chunks = (gathered.chunk(2, dim=1) for gathered in kept)
                key, value = (torch.cat(parts, dim=1) for parts in zip(*chunks, strict=True))
        if self._cache is not None:
            tokens = slice(len(self._positions))  # gathered keys may be followed by those of padding
            self._cache.store_prompt(layer_number, key[tokens], value[tokens], self._groups, self._positions)
        return output


def _partial_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attend to a part of the keys, and return the log-sum-exp with which parts are combined.

    It calls torch's operators directly, since F.scaled_dot_product_attention does not return the log-sum-exp.

    Args:
        query: [batch, heads, queries, head_dim].
        key, value: [batch, heads, keys, head_dim].
        mask: added to the scores, [batch, 1, 1, keys].
        scale: factor of the scores; None for head_dim ** -0.5.

    Returns:
        The output, [batch, heads, queries, head_dim], and the log-sum-exp, float32 [batch, heads, queries].
    """
    shape = (*query.shape[:3], key.shape[2])
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=None if mask is None else mask.expand(shape), scale=scale
        )
    output, log_sum_exp, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None if mask is None else mask.expand(shape), True, scale=scale
    )
    return output, log_sum_exp[:, :, : query.shape[2]]  # the kernel rounds the number of queries up
