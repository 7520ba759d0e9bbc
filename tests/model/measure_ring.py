#!/usr/bin/env python3
"""Compare three ways to attend across context-parallel ranks: bytes that a rank sends, and its temporary memory.

    python -m tests.model.measure_ring --tokens 8192

Four processes compute the attention of one layer, forward and backward, over a prompt in zigzag: with the gather in
chunks of heads, with one gather of all heads, and in a ring that passes keys and values from rank to rank. The head
counts are those of a 7B model, with a small head size.
"""

from __future__ import annotations

import argparse
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vcr1_kernels import SegmentLayout

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.model import context_attention
from megatron_vcr1.model.context_attention import attend_across_ranks
from megatron_vcr1.model.context_shard import zigzag_ranges
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.context import KeyGather
from tests.gloo import GlooPool

NUM_RANKS, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 28, 4, 16
METHODS = ("chunks", "gather", "ring")
aten = torch.ops.aten


class _Meter(TorchDispatchMode):
    """Measures the bytes of the tensors that are alive, and of those that are sent."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            sizes = [x.nbytes for x in tree_leaves(args[:2]) if isinstance(x, Tensor)]
            # Of a collective, a rank sends as much as it receives: the whole buffer less its own part.
            if not name.startswith("recv"):
                self.sent[name] += max(sizes) - min(sizes) if len(sizes) > 1 else sizes[0]
            return func(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def rank_tokens(num_tokens: int, rank: int) -> Tensor:
    """Return the tokens of a prompt that a rank has."""
    return torch.cat([torch.arange(*part) for part in zigzag_ranges(num_tokens, rank, NUM_RANKS)])


class _Ring(torch.autograd.Function):
    """Attention to keys and values that go from rank to rank. In backward, their gradients go with them."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.zeros_like(query)
        log_sum_exp = torch.full(query.shape[:2], -torch.inf)
        for owner, pair in _travelling(torch.cat((key, value), dim=1)):
            for queries, keys, causal in _blocks(owner, len(query)):
                result, lse = aten._scaled_dot_product_flash_attention_for_cpu(
                    _heads(query[queries]), *map(_heads, pair[keys].chunk(2, dim=1)), is_causal=causal
                )
                result, lse, before = _tokens(result), _tokens(lse), log_sum_exp[queries]
                merged = torch.logaddexp(before, lse)
                output[queries] = output[queries] * _weight(before, merged) + result * _weight(lse, merged)
                log_sum_exp[queries] = merged
        ctx.save_for_backward(query, key, value, output, log_sum_exp)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, ...]:
        query, key, value, output, log_sum_exp = ctx.saved_tensors
        grad_query, grad_pair = torch.zeros_like(query), torch.zeros(len(key), 2 * key.shape[1], key.shape[2])
        for owner, pair in _travelling(torch.cat((key, value), dim=1)):
            if owner != mesh.context_rank():
                grad_pair = _pass_on(grad_pair)()
            for queries, keys, causal in _blocks(owner, len(query)):
                grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    *(_heads(tensor[queries]) for tensor in (grad_output, query)),
                    *map(_heads, pair[keys].chunk(2, dim=1)),
                    *(_heads(tensor[queries]) for tensor in (output, log_sum_exp)),
                    0.0,
                    causal,
                )
                grad_query[queries] += _tokens(grads[0])
                grad_pair[keys] += torch.cat([_tokens(grad) for grad in grads[1:]], dim=1)
        grad_pair = _pass_on(grad_pair)()  # to the rank that the keys belong to
        grad_key, grad_value = grad_pair.chunk(2, dim=1)
        return grad_query, grad_key, grad_value


def _travelling(pair: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield the keys and values of every rank, from this rank's on; the next ones are on their way."""
    for step in range(NUM_RANKS):
        following = _pass_on(pair) if step < NUM_RANKS - 1 else None
        yield (mesh.context_rank() - step) % NUM_RANKS, pair
        if following is not None:
            pair = following()


def _pass_on(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to send a tensor to the next rank and to receive one; return the function that waits for it."""
    group = parallel_state.get_context_parallel_group()
    rank, received = mesh.context_rank(), torch.empty_like(tensor)
    works = (
        dist.isend(tensor, (rank + 1) % NUM_RANKS, group),
        dist.irecv(received, (rank - 1) % NUM_RANKS, group),
    )

    def finish() -> Tensor:
        for work in works:
            assert work is not None
            work.wait()
        return received

    return finish


def _blocks(owner: int, num_tokens: int) -> Iterator[tuple[slice, slice, bool]]:
    """Yield which of this rank's queries attend to which keys of a rank, and whether causally."""
    early, late = slice(num_tokens // 2), slice(num_tokens // 2, num_tokens)
    rank = mesh.context_rank()
    yield late, early, False
    if owner <= rank:
        yield early, early, owner == rank
    if owner >= rank:
        yield late, late, owner == rank


def _heads(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)[None]


def _tokens(tensor: Tensor) -> Tensor:
    return tensor[0].transpose(0, 1)


def _weight(part: Tensor, whole: Tensor) -> Tensor:
    return (part - whole).exp()[..., None]


def attend(method: str, num_tokens: int) -> tuple[list[Tensor], Counter[str], int]:
    """Run one method on this rank.

    Returns:
        Output and gradients of query, key and value; bytes sent by collective; peak of the temporary tensors in bytes.
    """
    mesh.initialize(ParallelSection(context=NUM_RANKS))
    rank, generator = mesh.context_rank(), torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(num_tokens, heads, HEAD_DIM, generator=generator)[rank_tokens(num_tokens, rank)]
        for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS, NUM_HEADS)
    ]
    query, key, value, grad = (tensor.requires_grad_() for tensor in inputs)
    rows = torch.cat([rank_tokens(num_tokens, other) for other in range(NUM_RANKS)]).argsort()
    plan = KeyGather(len(query), len(query), rows, own_start=len(query))
    layout = SegmentLayout((num_tokens,), (-1,), queries=zigzag_ranges(num_tokens, rank, NUM_RANKS))
    with _metered(1 if method == "gather" else context_attention.MAX_CHUNKS) as meter:
        if method == "ring":
            output = _Ring.apply(query, key, value)
        else:
            output = attend_across_ranks(query, key, value, layout, plan, scale=None, keeps_gathered=False)
        grads = torch.autograd.grad(output, (query, key, value), grad)
    return [output.detach(), *grads], meter.sent, meter.peak


@contextmanager
def _metered(max_chunks: int) -> Iterator[_Meter]:
    with mock.patch.object(context_attention, "MAX_CHUNKS", max_chunks), _Meter() as meter:
        yield meter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    num_tokens = parser.parse_args().tokens
    pool = GlooPool()
    unit = num_tokens // NUM_RANKS * 2 * NUM_KV_HEADS * HEAD_DIM * 4
    print(f"1 unit = keys and values of one rank's {num_tokens // NUM_RANKS} tokens, {unit / 1e6:.1f} MB")
    for method in METHODS:
        ranks = pool.run(attend, method, num_tokens)
        sent, peak = max(sum(sent.values()) for _, sent, _ in ranks), max(peak for _, _, peak in ranks)
        print(f"{method:8} sent {sent / unit:.2f} units, at most {peak / unit:.1f} units in memory", flush=True)
    pool.close()


if __name__ == "__main__":
    main()
