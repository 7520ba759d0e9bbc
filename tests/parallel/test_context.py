"""The collectives of context parallelism: what each rank receives, and the bytes that they send."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.parallel import mesh
from megatron_vcr1.parallel.context import (
    KeyGather,
    one_ahead,
    start_gather,
    start_scatter,
    sum_over_context_ranks,
)
from tests.gloo import GlooPool

pytestmark = pytest.mark.xdist_group("gloo")

# A prompt of 5 tokens on two ranks, in zigzag: parts of 2, 1, 1 and 1 tokens. Rank 0 has a response of 2 tokens; rank 1
# has one of 3 and computes the last token of the prompt once more.
PROMPT_TOKENS = ([0, 1, 4], [2, 3])
TOKENS = ([0, 1, 4, 5, 6], [2, 3, 4, 7, 8, 9])
KEYS = ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 7, 8, 9])
ROWS = torch.tensor([0, 1, 3, 4, 2])


def plan_of(rank: int) -> KeyGather:
    """Return the plan of these tokens."""
    return KeyGather(len(PROMPT_TOKENS[rank]), slots=3, rows=ROWS, own_start=3)


def _communicate() -> dict[str, Any]:
    """Gather keys and scatter their gradients, with a token's number as its value; exchange features; sum."""
    mesh.initialize(ParallelSection(context=2))
    rank, sent = mesh.context_rank(), list[int]()
    gather, scatter = dist.all_gather_into_tensor, dist.reduce_scatter_tensor

    def counting_gather(output: Tensor, part: Tensor, **kwargs: Any) -> Any:
        sent.append(output.nbytes - part.nbytes)  # received from the others; a ring sends as much
        return gather(output, part, **kwargs)

    def counting_scatter(part: Tensor, inputs: Tensor, **kwargs: Any) -> Any:
        sent.append(inputs.nbytes - part.nbytes)
        return scatter(part, inputs, **kwargs)

    dist.all_gather_into_tensor, dist.reduce_scatter_tensor = counting_gather, counting_scatter
    try:
        gathered = start_gather(_numbered(TOKENS[rank]), plan_of(rank))()
        scattered = start_scatter(_numbered(KEYS[rank]), plan_of(rank), len(TOKENS[rank]))()
    finally:
        dist.all_gather_into_tensor, dist.reduce_scatter_tensor = gather, scatter
    total = sum_over_context_ranks(torch.tensor([float(rank + 1)]))
    return {
        "gathered": gathered,
        "scattered": scattered,
        "sent": sent,
        "sum": float(total),
    }


def _numbered(tokens: list[int]) -> Tensor:
    """Return float64 [tokens, 2 heads, 4] with the number of each token."""
    return torch.tensor(tokens).double()[:, None, None].expand(-1, 2, 4).contiguous()


def test_keys_and_gradients_go_to_the_right_ranks(gloo_pool: GlooPool) -> None:
    answers = gloo_pool.run(_communicate)
    assert [answer["sum"] for answer in answers] == [3.0] * 4
    for answer, rank in zip(answers, (0, 1, 0, 1), strict=True):  # two replicas
        assert torch.equal(answer["gathered"], _numbered(KEYS[rank]))
        # The gradients of prompt tokens are summed over the ranks. The repeated token has a query only.
        expected = [2 * token if token in PROMPT_TOKENS[rank] else token if token > 4 else 0 for token in TOKENS[rank]]
        assert torch.equal(answer["scattered"], _numbered(expected))
        # (N - 1) * slots tokens of 2 heads of 4 float64 values.
        assert answer["sent"] == [1 * 3 * 2 * 4 * 8] * 2


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_result_is_awaited_after_the_next_collective_has_started(number: int) -> None:
    events: list[str] = []

    def start(index: int) -> Any:
        events.append(f"start {index}")
        return lambda: events.append(f"wait {index}") or torch.tensor(index)

    results = [int(result) for result in one_ahead(start(index) for index in range(number))]
    assert results == list(range(number))
    assert (
        events
        == {
            0: [],
            1: ["start 0", "wait 0"],
            3: ["start 0", "start 1", "wait 0", "start 2", "wait 1", "wait 2"],
        }[number]
    )
