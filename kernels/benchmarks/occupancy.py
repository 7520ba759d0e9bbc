#!/usr/bin/env python3
"""Simulate how well the attention kernels fill a GPU: the programs of a GRPO group, run in launch order.

A GPU starts programs in the order of the grid, the next one as soon as a streaming multiprocessor (SM) is free. The
simulation does the same with the work tables that the kernels read. It counts iterations of the kernels' inner loops,
so it shows idle SMs, not speed. It needs no GPU:

    python kernels/benchmarks/occupancy.py --prompt 6000 --response 256 --group 8
"""

from __future__ import annotations

import argparse
import heapq
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch

if __name__ == "__main__":  # the benchmarks are not installed; they are imported from the folder of the repository
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vcr1_kernels import SegmentLayout
from vcr1_kernels.triton_ops import attention

FIXED_COST = 2.0
"""Time that a program takes to start, load its resident tile and store its result, in iterations of its inner loop."""

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 28, 4, 128
"""Attention heads of Qwen2.5-VL-7B."""


@dataclass(frozen=True)
class Occupancy:
    """The simulated run of one kernel.

    Attributes:
        kernel: "forward", "dq" or "dkdv".
        num_programs: number of programs of a kernel, of all heads together.
        busy: part of the SMs' time in which they run programs, from the start to the end of the last program.
    """

    kernel: str
    num_programs: int
    busy: float


def simulate(layout: SegmentLayout, num_heads: int, *, num_sms: int = attention.HOPPER_NUM_SMS) -> list[Occupancy]:
    """Simulate the attention of a layout with `num_heads` query heads on this tensor-parallel rank, in bfloat16."""
    query = torch.empty(0, num_heads, HEAD_DIM, dtype=torch.bfloat16)
    forward_tiles, query_tiles = attention._query_tiles(query, layout)
    kernels = {
        "forward": (forward_tiles, _query_block_costs(layout, forward_tiles, query.device)),
        "dq": (query_tiles, _query_block_costs(layout, query_tiles, query.device)),
        "dkdv": (attention._key_tiles(query, layout), _key_block_costs(layout, query)),
    }
    results = []
    for kernel, (tiles, costs) in kernels.items():
        programs_per_sm = 8 // tiles.num_warps  # registers are the limit: 255 per thread, 65,536 per SM
        busy = _busy(costs, num_heads, num_sms, programs_per_sm)
        results.append(Occupancy(kernel, num_heads * len(costs), busy))
    return results


def _query_block_costs(layout: SegmentLayout, tiles: attention._Tiles, device: torch.device) -> list[float]:
    """Return the iterations of each row of the table of query blocks."""
    costs = []
    for start, end, own_start, prefix_start, prefix_end, _ in attention._query_blocks(
        layout, tiles.resident, device
    ).tolist():
        own_end = min(start + tiles.resident, end) if layout.causal else end
        costs.append(FIXED_COST + _num_tiles([(prefix_start, prefix_end), (own_start, own_end)], tiles.streamed))
    return costs


def _key_block_costs(layout: SegmentLayout, query: torch.Tensor) -> list[float]:
    """Return the iterations of each row of the table of key blocks, for a model with grouped-query attention."""
    tiles = attention._key_tiles(query, layout)
    num_splits = attention._num_key_splits(query, query[:, :1], layout, tiles)
    blocks, ranges = (table.tolist() for table in attention._key_blocks(layout, tiles, num_splits, query.device))
    return [
        FIXED_COST + _num_tiles([(first, last) for first, last, _ in ranges[first_range:end_range]], tiles.streamed)
        for _, _, first_range, _, end_range, _ in blocks
    ]


def _num_tiles(ranges: Iterable[tuple[int, int]], tile: int) -> int:
    """Return the number of tiles that cover the ranges; each range begins with a new tile."""
    return sum(-(-(end - start) // tile) for start, end in ranges)


class _Multiprocessor:
    """An SM whose programs share its tensor cores equally: each of n programs runs at 1/n of the speed of a single one.

    Attributes:
        progress: iterations that a program that was there from the start would have done.
        finish_at: for each program, the progress at which it is finished.
    """

    def __init__(self) -> None:
        self.time, self.progress = 0.0, 0.0
        self.finish_at: list[float] = []

    def next_finish(self) -> float:
        """Return the time at which the next program finishes."""
        return self.time + (min(self.finish_at) - self.progress) * len(self.finish_at)

    def finish_next(self) -> None:
        """Run until the next program is finished, and remove it."""
        self.time, self.progress = self.next_finish(), min(self.finish_at)
        self.finish_at.remove(self.progress)


def _busy(costs: Sequence[float], num_heads: int, num_sms: int, programs_per_sm: int) -> float:
    """Run the programs in launch order: for each row of the table, all heads (the fastest axis of the grid)."""
    programs = (cost for row_cost in costs for cost in repeat(row_cost, num_heads))
    sms = [_Multiprocessor() for _ in range(num_sms)]
    for _ in range(programs_per_sm):
        for sm, cost in zip(sms, programs, strict=False):
            sm.finish_at.append(cost)
    queue = [(sm.next_finish(), index) for index, sm in enumerate(sms) if sm.finish_at]
    heapq.heapify(queue)
    end = 0.0
    while queue:
        end, index = heapq.heappop(queue)
        sms[index].finish_next()
        if (cost := next(programs, None)) is not None:
            sms[index].finish_at.append(sms[index].progress + cost)
        if sms[index].finish_at:
            heapq.heappush(queue, (sms[index].next_finish(), index))
    return num_heads * sum(costs) / (num_sms * end)


def main() -> None:
    """Print the occupancy of each kernel at tensor-parallel sizes 1, 2 and 4."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--prompt", type=int, default=6000, metavar="TOKENS", help="length of the prompt (default 6000)"
    )
    parser.add_argument(
        "--response", type=int, default=256, metavar="TOKENS", help="length of a response (default 256)"
    )
    parser.add_argument("--group", type=int, default=8, metavar="N", help="responses to the prompt (default 8)")
    args = parser.parse_args()
    layout = SegmentLayout((args.prompt, *[args.response] * args.group), (-1, *[0] * args.group))
    print(f"P={args.prompt} G={args.group} R={args.response}, {attention.HOPPER_NUM_SMS} SMs, simulated")
    print(f"{'heads':>8}  {'TP':>2}  {'kernel':<8} {'programs':>8}  busy")
    for tensor_parallel in (1, 2, 4):
        num_heads, num_kv_heads = NUM_HEADS // tensor_parallel, NUM_KV_HEADS // tensor_parallel
        for result in simulate(layout, num_heads):
            print(
                f"{num_heads:>5}/{num_kv_heads:<2}  {tensor_parallel:>2}  {result.kernel:<8} "
                f"{result.num_programs:>8}  {result.busy:.1%}"
            )


if __name__ == "__main__":
    main()
