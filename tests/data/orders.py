"""Sample orders of two small sources, for the tests of the order and of the loader."""

from __future__ import annotations

from megatron_vcr1.data.order import SampleOrder, Source
from megatron_vcr1.tasks import QualityTarget
from megatron_vcr1.types import Sample, Video


def samples(name: str, count: int) -> list[Sample]:
    return [
        Sample(f"{name}{index}", (Video(f"{name}{index}.mp4"),), QualityTarget("good"), "how?")
        for index in range(count)
    ]


def order(seed: int = 0, weights: tuple[float, float] | None = None) -> SampleOrder:
    first, second = weights or (None, None)
    return SampleOrder([Source("a", samples("a", 12), first), Source("b", samples("b", 5), second)], seed)


def ids(order: SampleOrder, count: int, start: int = 0) -> list[str]:
    return [order.sample_at(position).id for position in range(start, start + count)]
