"""A step's numbers: gathered where they arise, and made one over all ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_vcr1 import timeline
from megatron_vcr1.config.model_sections import ModelSection
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.flops import Workload, bf16_peak, training_flops
from megatron_vcr1.model.packed_batch import PackedBatch
from megatron_vcr1.parallel import collectives, mesh

PHASES = ("decode", "rollout", "judge", "reference", "update", "sync", "save", "total")


class Metrics:
    """One rank's share of a step's metrics.

    A quantity that several ranks of a copy of the model know is added by one of them.
    """

    def __init__(self) -> None:
        self._means: dict[str, tuple[float, float]] = {}  # sum, weight
        self._counts: dict[str, float] = {}
        self._maxima: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    def add(self, name: str, total: float, weight: float = 1.0) -> None:
        """Take a sum of `weight` values into a mean over all ranks."""
        before = self._means.get(name, (0.0, 0.0))
        self._means[name] = (before[0] + total, before[1] + weight)

    def count(self, name: str, number: float = 1) -> None:
        """Add to a sum over all ranks."""
        self._counts[name] = self._counts.get(name, 0) + number

    def high(self, name: str, value: float) -> None:
        """Take a value into a maximum over all ranks."""
        self._maxima[name] = max(value, self._maxima.get(name, value))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add a with-block's time to the seconds of a phase; of all ranks the slowest counts. Profiles show it."""
        start = time.perf_counter()
        try:
            with timeline.span(phase):
                yield
        finally:
            self.add_seconds(phase, time.perf_counter() - start)

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Add to the seconds of a phase."""
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def reduce(self) -> dict[str, float]:
        """All ranks' metrics as one, on every rank; a mean without any value is left out."""
        merged = Metrics()
        for other in collectives.gather_objects(self):
            merged._merge(other)
        means = {name: total / weight for name, (total, weight) in merged._means.items() if weight}
        seconds = {f"time/{phase}_s": merged._seconds.get(phase, 0.0) for phase in PHASES}
        return {**means, **merged._counts, **merged._maxima, **seconds}

    def _merge(self, other: Metrics) -> None:
        for name, (total, weight) in other._means.items():
            self.add(name, total, weight)
        for name, number in other._counts.items():
            self.count(name, number)
        for name, value in other._maxima.items():
            self.high(name, value)
        for phase, seconds in other._seconds.items():
            self._seconds[phase] = max(seconds, self._seconds.get(phase, 0.0))


def add_work(metrics: Metrics, batches: Sequence[PackedBatch], config: ModelConfig, section: ModelSection) -> None:
    """Count the rows and the FLOPs of an update's forward and backward pass; once a copy of the model."""
    if not mesh.is_replica_leader():
        return
    work = Workload()
    for batch in batches:
        work += Workload.of_batch(config, batch)
    metrics.count("tokens", work.tokens)
    metrics.count("model_flops", training_flops(config, work, freeze=section.freeze).total)


def derived(metrics: dict[str, float], num_ranks: int, device_name: str | None) -> dict[str, float]:
    """The rates of a step.

    tokens_per_s: rows trained on (prompts once a group, responses) a second of the whole step.
    tflops_per_s: model FLOPs of the updates a second of update time and rank, in 10^12.
    mfu: these over the device's published bfloat16 peak; left out where that is not known, as for CPUs.

    Args:
        device_name: what CUDA calls the GPU; None without one.
    """
    rates: dict[str, float] = {}
    if "tokens" in metrics and metrics["time/total_s"] > 0:
        rates["tokens_per_s"] = metrics["tokens"] / metrics["time/total_s"]
    if "model_flops" in metrics and metrics["time/update_s"] > 0:
        flops_per_s = metrics["model_flops"] / metrics["time/update_s"] / num_ranks
        rates["tflops_per_s"] = flops_per_s / 1e12
        if device_name is not None and (peak := bf16_peak(device_name)):
            rates["mfu"] = flops_per_s / peak
    return rates


def device_name() -> str | None:
    """What CUDA calls this process's GPU; None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def peak_memory_gb() -> float:
    """Most memory held at once: of the GPU since the last call; without one, of this process since its start."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 1e9
    import resource  # Unix only, as training is

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
