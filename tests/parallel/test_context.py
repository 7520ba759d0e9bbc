"""The collectives of context parallelism against one process, in float64, and the bytes that they send."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from vcr1_kernels import SegmentLayout, shared_prefix_attention

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.context import (
    FeatureExchange,
    KeyGather,
    exchange_features,
    gather_keys,
    regather_in_backward,
    sum_over_context_ranks,
)
from tests.gloo import GlooPool

pytestmark = pytest.mark.xdist_group("gloo")

# A prompt of 5 tokens on two ranks, in zigzag: parts of 2, 1, 1 and 1 tokens. Rank 0 has a response of 2 tokens; rank 1
# has one of 3 and computes the last token of the prompt once more.
PROMPT_TOKENS = ([0, 1, 4], [2, 3])
TOKENS = ([0, 1, 4, 5, 6], [2, 3, 4, 7, 8, 9])
ROWS = torch.tensor([0, 1, 3, 4, 2])
QUERIES = (((0, 2), (4, 5), (5, 7)), ((2, 3), (3, 4), (4, 5), (5, 8)))
LAYOUT = SegmentLayout((5, 2, 3), (-1, 0, 0))


def _inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((10, 4, 8), (10, 2, 8), (10, 2, 8), (10, 4, 8))  # query, key, value, gradient of the output
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def _attend() -> dict[str, Any]:
    """Attend with this rank's tokens, and return the output and the gradients of their query, key and value."""
    mesh.initialize(ParallelSection(context=2))
    rank = mesh.context_rank()
    sent: list[int] = []
    gather, scatter = dist.all_gather_into_tensor, dist.reduce_scatter_tensor

    def counting_gather(output: Tensor, part: Tensor, **kwargs: Any) -> Any:
        sent.append(output.nbytes - part.nbytes)  # received from the others; a ring sends as much
        return gather(output, part, **kwargs)

    def counting_scatter(part: Tensor, inputs: Tensor, **kwargs: Any) -> Any:
        sent.append(inputs.nbytes - part.nbytes)
        return scatter(part, inputs, **kwargs)

    query, key, value, grad = (tensor[TOKENS[rank]].requires_grad_() for tensor in _inputs())
    # The repeated token is a token of its own here: its gradient counts for the same token of the whole sequence.
    plan = KeyGather(len(PROMPT_TOKENS[rank]), slots=3, rows=ROWS, own_start=3)
    layout = SegmentLayout((5, 2 + rank), (-1, 0), queries=QUERIES[rank])
    results = []
    for regathers in (False, True):
        sent.clear()
        dist.all_gather_into_tensor, dist.reduce_scatter_tensor = counting_gather, counting_scatter
        try:
            local = torch.cat((key, value), dim=1)
            gathered = gather_keys(local, plan)
            with _regather(gathered, local, plan) if regathers else nullcontext():
                output = shared_prefix_attention(query, *gathered.chunk(2, dim=1), layout)
            grads = torch.autograd.grad(output, (query, key, value), grad)
        finally:
            dist.all_gather_into_tensor, dist.reduce_scatter_tensor = gather, scatter
        results.append((output.detach(), *grads))
        # (N - 1) * slots tokens of 2 * 2 heads of 8 float64 values, gathered once (or twice) and scattered once.
        assert sent == [1 * 3 * 4 * 8 * 8] * (3 if regathers else 2)
    assert all(map(torch.equal, *results))
    total = sum_over_context_ranks(torch.tensor([float(rank + 1)]))
    return {"results": results[0], "sum": float(total), "features": _exchange(rank)}


def _regather(gathered: Tensor, local: Tensor, plan: KeyGather) -> AbstractContextManager[None]:
    return regather_in_backward(gathered, lambda: gather_keys(local.detach(), plan))


def _exchange(rank: int) -> Tensor:
    """Exchange features that are [10 * rank + row], and return them with the gradient of this rank's features."""
    # Rank 0 encodes 3 features and needs its own 0 and 2, and rank 1's only feature before them; rank 1 needs rank 0's
    # features 1 and 1 once more.
    plans = (
        FeatureExchange(torch.tensor([0, 2, 1, 1]), (2, 2), (2, 1), torch.tensor([2, 0, 1]), 4),
        FeatureExchange(torch.tensor([0]), (1, 0), (2, 0), torch.tensor([0, 1]), 4),
    )
    features = (torch.arange((3, 1)[rank]).double()[:, None] + 10 * rank).requires_grad_()
    received = exchange_features(features, plans[rank])
    (grad,) = torch.autograd.grad((received * (received.detach() + 1)).sum(), features)
    return torch.cat((received.detach(), grad))[:, 0]


def test_ranks_attend_as_one_process_does(gloo_pool: GlooPool) -> None:
    answers = gloo_pool.run(_attend)
    whole = [tensor.requires_grad_() for tensor in _inputs()]
    query, key, value, grad = whole
    # Token 4 has two queries, and both have a gradient: the second one belongs to rank 1.
    queries = torch.cat((query, query[4:5]))
    layout = SegmentLayout(LAYOUT.lengths, LAYOUT.prefixes, queries=((0, 10), (4, 5)))
    output = shared_prefix_attention(queries, key, value, layout)
    grads = torch.autograd.grad(output, (query, key, value), torch.cat((grad, grad[4:5])))
    for start in (0, 2):  # two replicas
        sums = [torch.zeros_like(tensor) for tensor in grads]
        for rank in (0, 1):
            results = answers[start + rank]["results"]
            torch.testing.assert_close(results[0], output[TOKENS[rank]])
            for total, part in zip(sums, results[1:], strict=True):
                total.index_add_(0, torch.tensor(TOKENS[rank]), part)
        for total, expected in zip(sums, grads, strict=True):
            torch.testing.assert_close(total, expected)


def test_features_and_their_gradients_go_to_the_right_ranks(gloo_pool: GlooPool) -> None:
    answers = gloo_pool.run(_attend)
    assert [answer["sum"] for answer in answers] == [3.0] * 4
    # Received features, then the gradient of the own features: received + 1, summed over the receivers.
    assert answers[0]["features"].tolist() == [10, 0, 2, 1, 4, 3]
    assert answers[1]["features"].tolist() == [1, 1, 11]
