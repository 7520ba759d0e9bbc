"""Metrics of a training step: accumulated on each rank, reduced over all ranks once per step."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from megatron_vcr1 import timeline
from megatron_vcr1.config.model_sections import RecomputeSection
from megatron_vcr1.model.config import ModelConfig
from megatron_vcr1.model.flops import Workload, bf16_peak, forward_flops, recomputed_flops, training_flops
from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.training.microbatches import Microbatch

PHASES = ("decode", "rollout", "judge", "reference", "old_log_probs", "update", "sync", "save", "total")
FORWARD_PHASES = ("reference", "old_log_probs")
"""Phases that compute log-probs with a forward pass alone."""


class Metrics:
    """One rank's contributions to the metrics of a step.

    If several ranks of a replica know a quantity, only one of them may add it: sums and means are taken over all ranks
    of the job.
    """

    def __init__(self) -> None:
        self._means: dict[str, tuple[float, float]] = {}  # sum, weight
        self._sums: dict[str, float] = {}
        self._maxima: dict[str, float] = {}
        self._seconds: dict[str, float] = {}

    def add_to_mean(self, name: str, total: float, weight: float = 1.0) -> None:
        """Add values to a mean over all ranks.

        Args:
            total: sum of the values.
            weight: number of values.
        """
        old_total, old_weight = self._means.get(name, (0.0, 0.0))
        self._means[name] = (old_total + total, old_weight + weight)

    def add_to_sum(self, name: str, value: float = 1) -> None:
        """Add a value to a sum over all ranks."""
        self._sums[name] = self._sums.get(name, 0) + value

    def update_max(self, name: str, value: float) -> None:
        """Include a value in a maximum over all ranks."""
        self._maxima[name] = max(value, self._maxima.get(name, value))

    @contextmanager
    def time_phase(self, phase: str, *, wait_for_device: bool = False) -> Iterator[None]:
        """Add the time of the with-block to the seconds of a phase, and mark the phase in profiles.

        Args:
            wait_for_device: whether the phase ends when the GPU has finished its work, not when the work is submitted.
                Without it, the GPU time of a block that reads no result is added to the next phase.
        """
        start = time.perf_counter()
        try:
            with timeline.span(phase):
                yield
                if wait_for_device and torch.cuda.is_available():
                    torch.cuda.synchronize()
        finally:
            self.add_seconds(phase, time.perf_counter() - start)

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Add to the seconds of a phase. The reduced metrics have the seconds of the slowest rank."""
        self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def reduce(self) -> dict[str, float]:
        """Reduce the metrics of all ranks and return them on every rank. All ranks of the job must call it.

        A mean without values is left out. Every phase has an entry, 0 if it did not occur.
        """
        merged = Metrics()
        for rank_metrics in collectives.gather_objects(self):
            merged._merge(rank_metrics)
        means = {name: total / weight for name, (total, weight) in merged._means.items() if weight}
        seconds = {f"time/{phase}_s": merged._seconds.get(phase, 0.0) for phase in PHASES}
        return {**means, **merged._sums, **merged._maxima, **seconds}

    def _merge(self, other: Metrics) -> None:
        for name, (total, weight) in other._means.items():
            self.add_to_mean(name, total, weight)
        for name, value in other._sums.items():
            self.add_to_sum(name, value)
        for name, value in other._maxima.items():
            self.update_max(name, value)
        for phase, seconds in other._seconds.items():
            self._seconds[phase] = max(seconds, self._seconds.get(phase, 0.0))


def add_update_work(
    metrics: Metrics,
    batches: Sequence[Microbatch],
    config: ModelConfig,
    *,
    frozen_parts: Collection[str],
    recompute: RecomputeSection,
) -> None:
    """Add the tokens and FLOPs of an update's forward and backward pass, once per replica.

    Args:
        batches: the update's microbatches.
        frozen_parts: model.freeze; these parts have no weight gradients to compute.
        recompute: what the backward pass recomputes; only the hardware FLOPs count it.
    """
    if not mesh.is_replica_leader():
        return
    work = _workload(batches, config)
    useful = training_flops(config, work, freeze=frozen_parts).total
    metrics.add_to_sum("tokens", work.tokens)
    metrics.add_to_sum("model_flops", useful)
    recomputed = recomputed_flops(config, work, recompute, freeze=frozen_parts).total
    metrics.add_to_sum("hardware_flops", useful + recomputed)


def add_forward_work(metrics: Metrics, phase: str, batches: Sequence[Microbatch], config: ModelConfig) -> None:
    """Add the FLOPs of a forward pass to a phase of `FORWARD_PHASES`, once per replica."""
    if mesh.is_replica_leader():
        metrics.add_to_sum(f"model_flops/{phase}", forward_flops(config, _workload(batches, config)).total)


def _workload(batches: Sequence[Microbatch], config: ModelConfig) -> Workload:
    return sum((Workload.of_batch(config, batch.packed) for batch in batches), Workload())


def throughput(metrics: Mapping[str, float], num_ranks: int, device_name: str | None) -> dict[str, float]:
    """Compute the rates of a step from its reduced metrics.

    Args:
        metrics: the tokens and FLOPs may be missing; then the rates that need them are left out.
        num_ranks: number of ranks of the job.
        device_name: the GPU's name as CUDA reports it; None without a GPU.

    Returns:
        tokens_per_s: tokens trained on (prompts once per group, and responses), per second of the whole step.
        tflops_per_s: model FLOPs of the updates, per second of update time and per rank, in 10^12.
        mfu: tflops_per_s over the device's published bfloat16 peak. This rate and the next ones are left out for
            devices whose peak is not known, such as CPUs.
        mfu_hardware: the same with the FLOPs that the backward pass recomputes.
        mfu/PHASE: MFU of a forward pass without gradients, for the phases in `FORWARD_PHASES`.
    """
    rates: dict[str, float] = {}
    if "tokens" in metrics and metrics["time/total_s"] > 0:
        rates["tokens_per_s"] = metrics["tokens"] / metrics["time/total_s"]
    flops_per_s = {
        rate: metrics[flops] / metrics[f"time/{phase}_s"] / num_ranks
        for rate, flops, phase in (
            ("mfu", "model_flops", "update"),
            ("mfu_hardware", "hardware_flops", "update"),
            *((f"mfu/{phase}", f"model_flops/{phase}", phase) for phase in FORWARD_PHASES),
        )
        if flops in metrics and metrics[f"time/{phase}_s"] > 0
    }
    if "mfu" in flops_per_s:
        rates["tflops_per_s"] = flops_per_s["mfu"] / 1e12
    if device_name is not None and (peak := bf16_peak(device_name)):
        rates |= {rate: value / peak for rate, value in flops_per_s.items()}
    return rates


def device_name() -> str | None:
    """Return the name of this process's GPU as CUDA reports it; None without a GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def peak_memory_gb() -> float:
    """Return the peak memory in GB: allocated on the GPU since the last call, or of this process without a GPU."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 1e9
    import resource  # exists on Unix only; training does not run elsewhere

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # ru_maxrss is in KiB on Linux
