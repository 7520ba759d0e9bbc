"""Keys and values of generation: each prompt's once, and behind it those of every response.

The responses of a group read the same prompt keys. Their queries are laid side by side and meet the prompt in one
product, as one query of many rows; their own tokens are few, and equally many in all responses, which decode in step.
The softmax over both parts is joined by the parts' log-sum-exps, as in vcr1_kernels' shared-prefix attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vcr1_kernels import SegmentLayout, shared_prefix_attention

# Room for a response's own tokens grows by doubling: most responses end long before the limit.
_FIRST_CAPACITY = 64
# Keys of a prompt are padded to a multiple of this, as GPU attention with a mask asks for.
_LENGTH_MULTIPLE = 16


@dataclass
class _Layer:
    """One layer's memory; heads before lengths, as products want them."""

    prompt_keys: Tensor  # [groups, kv_heads, longest_prompt, head_dim], zero behind a prompt's end
    prompt_values: Tensor
    own_keys: Tensor  # [rows, kv_heads, capacity, head_dim]
    own_values: Tensor


class KVCache:
    """Memory of the responses that decode together, one row each, and of their groups' prompts, for this rank's layers.

    Fill it with a `PrefillAttention` for the prompts, then decode with `attend`, a token a row and pass.
    """

    def __init__(
        self, prompt_lengths: Sequence[int], response_groups: Sequence[int], max_own_tokens: int, device: torch.device
    ) -> None:
        """
        Args:
            prompt_lengths: tokens of each group's prompt.
            response_groups: each row's group; ascending.
            max_own_tokens: most tokens that a row will ever hold.
        """
        self.num_own = 0
        self._max_own_tokens = max_own_tokens
        self.device = device
        self._layers: dict[int, _Layer] = {}
        self._lay_out(list(prompt_lengths), list(response_groups))

    def _lay_out(self, prompt_lengths: list[int], response_groups: list[int]) -> None:
        """Where each row's query stands in a table [groups, width], whose spare cells repeat row 0."""
        self.prompt_lengths, self.response_groups = prompt_lengths, response_groups
        self.longest_prompt = -(-max(prompt_lengths) // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE
        rows_of_groups: list[list[int]] = [[] for _ in prompt_lengths]
        for row, group in enumerate(response_groups):
            rows_of_groups[group].append(row)
        self._width = max(map(len, rows_of_groups))
        self._table: Tensor | None = None
        self._cells: Tensor | None = None
        if any(len(rows) < self._width for rows in rows_of_groups):
            table = [rows + [0] * (self._width - len(rows)) for rows in rows_of_groups]
            cells = [
                group * self._width + place for group, rows in enumerate(rows_of_groups) for place in range(len(rows))
            ]
            self._table = torch.tensor(table, device=self.device).flatten()
            self._cells = torch.tensor(cells, device=self.device)
        self._mask: Tensor | None = None  # 0 or -inf, [groups, 1, 1, longest_prompt]
        if min(prompt_lengths) < self.longest_prompt:
            is_behind = torch.arange(self.longest_prompt) >= torch.tensor(prompt_lengths)[:, None]
            mask = torch.zeros(is_behind.shape).masked_fill(is_behind, -torch.inf)
            self._mask = mask[:, None, None].to(self.device)

    def store_prompt(self, layer_number: int, key: Tensor, value: Tensor, groups: Tensor, places: Tensor) -> None:
        """Keep a layer's keys and values of prompt tokens, [tokens, kv_heads, head_dim]."""
        if layer_number not in self._layers:
            _, num_kv_heads, head_dim = key.shape
            prompt_shape = (len(self.prompt_lengths), num_kv_heads, self.longest_prompt, head_dim)
            own_shape = (len(self.response_groups), num_kv_heads, 0, head_dim)
            self._layers[layer_number] = _Layer(
                key.new_zeros(prompt_shape),
                key.new_zeros(prompt_shape),
                key.new_empty(own_shape),
                key.new_empty(own_shape),
            )
        layer = self._layers[layer_number]
        layer.prompt_keys[groups, :, places] = key
        layer.prompt_values[groups, :, places] = value

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Attention of one new token a row, whose key and value are kept; `advance` after the last layer.

        Args:
            query: [rows, heads, head_dim].
            key, value: [rows, kv_heads, head_dim].

        Returns:
            [rows, heads, head_dim].
        """
        num_rows, num_heads, head_dim = query.shape
        num_kv_heads = key.shape[1]
        layer = self._layers[layer_number]
        self._keep_own(layer, key, value)
        num_own = self.num_own + 1
        # The query heads that share a key head are rows of one product.
        by_key_head = query.reshape(num_rows, num_kv_heads, -1, head_dim)
        own, own_lse = _partial_attention(
            by_key_head, layer.own_keys[:, :, :num_own], layer.own_values[:, :, :num_own], None, scale
        )
        table = by_key_head if self._table is None else by_key_head[self._table]
        table = table.unflatten(0, (-1, self._width)).transpose(1, 2).flatten(2, 3)
        mask = None if self._mask is None else self._mask.to(query.dtype)
        prompt, prompt_lse = _partial_attention(table, layer.prompt_keys, layer.prompt_values, mask, scale)
        prompt = prompt.unflatten(2, (self._width, -1)).transpose(1, 2).flatten(0, 1)
        prompt_lse = prompt_lse.unflatten(2, (self._width, -1)).transpose(1, 2).flatten(0, 1)
        if self._cells is not None:
            prompt, prompt_lse = prompt[self._cells], prompt_lse[self._cells]
        weight = (prompt_lse - own_lse).sigmoid()[..., None]
        output = own.float().lerp(prompt.float(), weight)  # in float32: half precision would round a second time
        return output.to(query.dtype).reshape(num_rows, num_heads, head_dim)

    def _keep_own(self, layer: _Layer, key: Tensor, value: Tensor) -> None:
        capacity = layer.own_keys.shape[2]
        if self.num_own == capacity:
            room = min(max(2 * capacity, _FIRST_CAPACITY), self._max_own_tokens) - capacity
            layer.own_keys, layer.own_values = (
                torch.cat((kept, kept.new_empty(*kept.shape[:2], room, kept.shape[3])), dim=2)
                for kept in (layer.own_keys, layer.own_values)
            )
        layer.own_keys[:, :, self.num_own] = key
        layer.own_values[:, :, self.num_own] = value

    def advance(self) -> None:
        """Every layer has kept its token of this pass."""
        self.num_own += 1

    def keep_responses(self, rows: Sequence[int]) -> None:
        """Forget all rows but these (ascending), and the prompts that no row is left of."""
        groups = sorted({self.response_groups[row] for row in rows})
        row_index = torch.tensor(rows, device=self.device)
        group_index = torch.tensor(groups, device=self.device)
        lengths = [self.prompt_lengths[group] for group in groups]
        loses_prompts = len(groups) < len(self.prompt_lengths)
        self._lay_out(lengths, [groups.index(self.response_groups[row]) for row in rows])
        for layer in self._layers.values():
            layer.own_keys, layer.own_values = layer.own_keys[row_index], layer.own_values[row_index]
            if loses_prompts:
                layer.prompt_keys = layer.prompt_keys[group_index, :, : self.longest_prompt]
                layer.prompt_values = layer.prompt_values[group_index, :, : self.longest_prompt]


class PrefillAttention:
    """Attention of a pass over whole prompts, packed one behind the other, that leaves their keys in a cache."""

    def __init__(self, cache: KVCache, groups: range) -> None:
        self._cache = cache
        lengths = [cache.prompt_lengths[group] for group in groups]
        self._layout = SegmentLayout.packed(lengths)
        self._groups = torch.repeat_interleave(torch.tensor(groups), torch.tensor(lengths)).to(cache.device)
        self._places = torch.cat([torch.arange(length) for length in lengths]).to(cache.device)

    def attend(self, layer_number: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """As `KVCache.attend`, of all the prompts' tokens."""
        self._cache.store_prompt(layer_number, key, value, self._groups, self._places)
        return shared_prefix_attention(query, key, value, self._layout, scale=scale)


def _partial_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Attention over a part of the keys, and the log-sum-exp by which parts are joined.

    Args:
        query: [batch, heads, queries, head_dim]; key and value [batch, heads, keys, head_dim].
        mask: added to the scores, [batch, 1, 1, keys].

    Returns:
        [batch, heads, queries, head_dim] and float32 [batch, heads, queries].
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
