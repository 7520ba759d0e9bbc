"""Attention across context-parallel ranks against one process, and the overlap of its collectives with computation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store
from vcr1_kernels import SegmentLayout, shared_prefix_attention

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.model import context_attention
from megatron_vcr1.model.context_attention import attend_across_ranks
from megatron_vcr1.model.key_chunks import num_chunks
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.context import KeyGather
from tests.gloo import GlooPool
from tests.limits import HANG_S
from tests.parallel.test_context import TOKENS, plan_of

pytestmark = pytest.mark.xdist_group("gloo")

LAYOUT = SegmentLayout((5, 2, 3), (-1, 0, 0))
QUERIES = (((0, 2), (4, 5), (5, 7)), ((2, 3), (3, 4), (4, 5), (5, 8)))
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 3, 8


def _inputs() -> list[Tensor]:
    """Return query, key, value and the gradient of the output of the whole sequence."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((10, heads, HEAD_DIM) for heads in (NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS, NUM_HEADS))
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


class _Events:
    """Records when collectives start and are awaited and when attention is computed, and delays some of rank 1.

    Events are numbered by kind: "gather 0" is the start of the first gather.
    """

    def __init__(self, name: str, held: dict[str, str]) -> None:
        """
        Args:
            name: tells the events of several computations apart.
            held: events of rank 1, with the event of rank 0 that each of them is held back for.
        """
        self._rank, self._held = mesh.context_rank(), held
        self._name = f"{mesh.replica_index()} {name}"
        self._store = _get_default_store()
        self.seen: list[str] = []

    def add(self, kind: str) -> str:
        event = f"{kind} {sum(other.split()[0] == kind for other in self.seen)}"
        self.seen.append(event)
        if self._rank == 0:
            self._store.set(f"{self._name} {event}", "")
        elif event in self._held:
            self._store.wait([f"{self._name} {self._held[event]}"], timedelta(seconds=HANG_S))
        return event

    def around(self, kind: str, function: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
        """Return the function with an event before it, or after it."""

        def recorded(*args: Any, **kwargs: Any) -> Any:
            event = None if after else self.add(kind)
            result = function(*args, **kwargs)
            if after:
                self.add(kind)
            return result if event is None else self._work(event, result)

        return recorded

    def _work(self, event: str, work: Any) -> Any:
        return mock.Mock(wait=lambda: (self.seen.append(f"wait-{event}"), work.wait()))

    @contextmanager
    def recorded(self) -> Iterator[None]:
        names = {"all_gather_into_tensor": "gather", "reduce_scatter_tensor": "scatter"}
        with (
            mock.patch.multiple(dist, **{name: self.around(kind, getattr(dist, name)) for name, kind in names.items()}),
            mock.patch.multiple(
                context_attention,
                attention_forward=self.around("attend", context_attention.attention_forward, after=True),
                attention_backward=self.around("differentiate", context_attention.attention_backward, after=True),
            ),
        ):
            yield


def _attend(held: dict[str, str]) -> list[tuple[list[Tensor], list[str]]]:
    """Attend with this rank's tokens: one chunk, one chunk per key-value head, the same with the gathered keys kept.

    Returns:
        For each of them the output, the gradients of query, key and value, and the events.
    """
    mesh.initialize(ParallelSection(context=2))
    rank = mesh.context_rank()
    query, key, value, grad = (tensor[TOKENS[rank]].requires_grad_() for tensor in _inputs())
    # The repeated token is a token of its own here: its gradient counts for the same token of the whole sequence.
    layout = SegmentLayout((5, 2 + rank), (-1, 0), queries=QUERIES[rank])
    results = []
    for max_chunks, keeps in ((1, False), (4, False), (4, True)):
        events = _Events(f"{max_chunks} {keeps}", held if (max_chunks, keeps) == (4, False) else {})
        with mock.patch.object(context_attention, "MAX_CHUNKS", max_chunks), events.recorded():
            output = attend_across_ranks(query, key, value, layout, plan_of(rank), scale=None, keeps_gathered=keeps)
            grads = torch.autograd.grad(output, (query, key, value), grad)
        results.append(([output.detach(), *grads], events.seen))
    return results


HELD = {
    "gather 1": "attend 0",  # the second gather of the forward pass ends after the attention of the first chunk
    "gather 4": "differentiate 0",  # the same in the backward pass
    "scatter 0": "differentiate 1",  # the first reduce-scatter ends after the second chunk
}


def test_collectives_are_under_way_while_attention_is_computed(gloo_pool: GlooPool) -> None:
    """Rank 1 holds some collectives back until rank 0 has done the computation that should overlap with them.

    If rank 0 waited for one of them before, both would wait for each other, and the test would not end.
    """
    for _, (results, events), (kept_results, kept_events) in gloo_pool.run(_attend, HELD):
        forward = ["gather 0", "gather 1", "wait-gather 0", "attend 0", "gather 2", "wait-gather 1", "attend 1"]
        forward += ["wait-gather 2", "attend 2"]
        scatters = ["wait-scatter 0", "differentiate 2", "scatter 2", "wait-scatter 1", "wait-scatter 2"]
        assert events == [
            *forward,
            *("gather 3", "gather 4", "wait-gather 3", "differentiate 0", "scatter 0"),
            *("gather 5", "wait-gather 4", "differentiate 1", "scatter 1"),
            *(scatters[0], "wait-gather 5", *scatters[1:]),
        ]
        assert kept_events == [
            *forward,
            *("differentiate 0", "scatter 0", "differentiate 1", "scatter 1"),
            *scatters,
        ]
        assert all(map(torch.equal, results, kept_results))


def test_heads_are_computed_in_at_most_four_chunks() -> None:
    for num_kv_heads in range(1, 20):
        assert num_chunks(num_kv_heads) == len(torch.empty(num_kv_heads).chunk(4))


def test_ranks_attend_as_one_process_does(gloo_pool: GlooPool) -> None:
    answers = gloo_pool.run(_attend, {})
    query, key, value, grad = whole = [tensor.requires_grad_() for tensor in _inputs()]
    # Token 4 has two queries, and both have a gradient: the second one belongs to rank 1.
    queries = torch.cat((query, query[4:5]))
    layout = SegmentLayout(LAYOUT.lengths, LAYOUT.prefixes, queries=((0, 10), (4, 5)))
    output = shared_prefix_attention(queries, key, value, layout)
    grads = torch.autograd.grad(output, whole[:3], torch.cat((grad, grad[4:5])))
    for start in (0, 2):  # two replicas
        sums = [torch.zeros_like(tensor) for tensor in grads]
        for rank in (0, 1):
            (results, _), (by_heads, _), _ = answers[start + rank]
            assert all(map(torch.equal, results, by_heads)), "chunks change no bit"
            torch.testing.assert_close(results[0], output[TOKENS[rank]])
            for total, part in zip(sums, results[1:], strict=True):
                total.index_add_(0, torch.tensor(TOKENS[rank]), part)
        for total, expected in zip(sums, grads, strict=True):
            torch.testing.assert_close(total, expected)


def test_gradients_of_a_chunk_are_freed_before_the_next_one_is_computed() -> None:
    """The attention of a chunk needs the most memory; the planner counts the gradients that are on their way alone."""
    plan = KeyGather(num_prompt_tokens=5, slots=5, rows=torch.arange(5), own_start=5)
    alive: list[weakref.ref[Tensor]] = []
    backward = context_attention.attention_backward

    def backward_after_check(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        assert not any(tensor() is not None for tensor in alive)
        grads: tuple[Tensor, ...] = backward(*args, **kwargs)
        alive.extend(map(weakref.ref, grads[1:]))
        return grads

    query, key, value, grad = (tensor.requires_grad_() for tensor in _inputs())
    with (
        mesh.world(ParallelSection()),
        mock.patch.object(context_attention, "attention_backward", backward_after_check),
    ):
        output = attend_across_ranks(query, key, value, LAYOUT, plan, scale=None, keeps_gathered=False)
        grads = torch.autograd.grad(output, (query, key, value), grad)
    assert len(alive) == 2 * num_chunks(NUM_KV_HEADS)
    expected = shared_prefix_attention(query, key, value, LAYOUT)
    for mine, theirs in zip(grads, torch.autograd.grad(expected, (query, key, value), grad), strict=True):
        torch.testing.assert_close(mine, theirs)
