"""One process of `train`: builds a side, measures its updates and saves its gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vcr1.parallel import collectives, mesh
from megatron_vcr1.throughput.measure import matmul_rate, memory_bytes, peak_memory_bytes, reset_peak_memory, timed
from megatron_vcr1.throughput.update_case import UpdateCase
from megatron_vcr1.training.profiling import profiled

OURS, PLAIN, PLAIN_KEPT, TRL = "ours", "plain", "plain, response logits", "trl"


def run_side(side: str, case: UpdateCase, gradients: Path | None, profile: Path | None) -> dict[str, Any] | None:
    """Build a side, warm it up and measure it. All ranks of our side must call this.

    Args:
        side: one of the constants above.
        gradients: file to save the gradients of the first update to.
        profile: folder for a profile of one more update of our side.

    Returns:
        On the first rank, the measurements, with the highest memory and seconds of all ranks; None on the others.
    """
    libraries = memory_bytes()
    reset_peak_memory()
    if side == TRL:
        from megatron_vcr1.throughput.update_trl import TrlUpdate

        update = TrlUpdate(case)
        return _measure(update, case, libraries, gradients) | {"notes": update.notes}
    if side != OURS:
        from megatron_vcr1.throughput.update_plain import PlainUpdate

        return _measure(PlainUpdate(case, full_logits=side == PLAIN), case, libraries, gradients)
    from megatron_vcr1.throughput.update_ours import OurUpdate

    with mesh.world(case.run_config.parallel, seed=case.seed):
        ours = OurUpdate(case)
        ranks = collectives.gather_objects(_measure(ours, case, libraries, gradients))
        if profile is not None:
            with profiled(profile, f"rank_{dist.get_rank()}"):
                ours.run()
        if not mesh.is_first_rank():
            return None
    return ranks[0] | {
        "seconds": [max(values) for values in zip(*(rank["seconds"] for rank in ranks), strict=True)],
        "cpu_seconds": [max(values) for values in zip(*(rank["cpu_seconds"] for rank in ranks), strict=True)],
        "peak_bytes": max(rank["peak_bytes"] for rank in ranks),
        "peak_bytes_by_rank": [rank["peak_bytes"] for rank in ranks],
    }


def _measure(update: Any, case: UpdateCase, libraries_bytes: int, gradients: Path | None) -> dict[str, Any]:
    """Run a warm-up update, whose loss and gradients are compared, then the measured updates."""
    at_rest = memory_bytes()
    loss = update.run()
    if gradients is not None:
        update.save_gradients(gradients)
    times = [timed(update.run) for _ in range(case.num_updates)]
    peak = peak_memory_bytes()  # includes the optimizer state, which the warm-up update allocated
    return {
        "seconds": [wall_s for wall_s, _ in times],
        "cpu_seconds": [cpu_s for _, cpu_s in times],
        "peak_bytes": peak,
        "at_rest_bytes": at_rest,  # weights, and the gradients and optimizer state that exist from the start
        "libraries_bytes": libraries_bytes,
        "loss": loss,
        "matmul_flops_per_s": matmul_rate(getattr(torch, case.dtype)),
    }
