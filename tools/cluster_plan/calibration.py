"""A device's rates from measured updates: the JSON files of `benchmark_throughput.py train`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from model_presets import model_config

from cluster_plan.devices import Device, Efficiency
from cluster_plan.job import Job, Layout
from cluster_plan.memory import training_memory
from cluster_plan.timing import busiest_seconds, pipeline_seconds, reference_seconds, update_seconds
from megatron_vcr1.errors import UserError
from megatron_vcr1.model.flops import bf16_peak

PARTS = ("text", "vision", "attention", "head")  # rates that are fitted
PRIOR = 0.005  # weight of the assumed rates: decides what measurements leave open


@dataclass(frozen=True, slots=True)
class Measured:
    """One update on one machine."""

    name: str
    job: Job
    layout: Layout
    seconds: float
    peak_bytes: float  # of the fullest rank
    fixed_bytes: float  # of it, before the model was built
    product_flops_per_s: float
    device: str

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @classmethod
    def from_file(cls, path: Path) -> Measured:
        """Raises UserError if it is no result of `benchmark_throughput.py train`."""
        try:
            raw = json.loads(path.read_text())
            return cls._from_result(path.stem, raw, raw["case"], raw["sides"]["ours"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}: no result of benchmark_throughput.py train --json ({type(error).__name__}: {error})"
            ) from None

    @classmethod
    def _from_result(cls, name: str, raw: dict[str, Any], case: dict[str, Any], ours: dict[str, Any]) -> Measured:
        on_gpu = raw["device"] != "cpu"
        copies = raw["copies"]
        job = Job(
            config=model_config(raw["model"]),
            prompts_per_step=case["num_prompts"],
            group_size=case["group_size"],
            prompt_tokens=case["prompt_tokens"],
            response_tokens=case["response_tokens"],
            dtype_bytes=4 if case["dtype"] == "float32" else 2,
            with_reference=bool(case["reference_dir"]),
            reference_resident=case["reference"] == "resident",
        )
        layout = Layout(
            tensor=case["tensor"],
            pipeline=case["pipeline"],
            copies=copies,
            sequence_parallel=case["sequence_parallel"],
            first_stage_layers=case["first_stage_layers"],
            recompute=case["recompute"],
            groups_per_microbatch=max(
                1, min(case["microbatch_tokens"] // job.group_rows, job.prompts_per_step // copies)
            ),
        )
        # On a CPU that others use, too, processor time is the steadier clock.
        clock = ours["seconds" if on_gpu else "cpu_seconds"]
        return cls(
            name=name,
            job=job,
            layout=layout,
            seconds=float(np.median(clock)),
            peak_bytes=ours["peak_bytes"],
            fixed_bytes=ours["libraries_bytes"],
            product_flops_per_s=ours["product_flops_per_s"],
            device=raw["device"],
        )


def calibrate(device: Device, runs: Sequence[Measured]) -> Device:
    """The device with rates that explain the runs on one rank best, and the memory that libraries took.

    Seconds are the sum over parts of operations / (peak x efficiency). Its reciprocals are fitted by least squares of
    relative errors, bounded below by 0, with a weak pull towards the device's own (`PRIOR`).

    Raises:
        UserError: no run was on a single rank.
    """
    single = [one for one in runs if one.layout.num_gpus == 1]
    if not single:
        raise UserError("calibration needs a run on one GPU, without tensor, pipeline or data parallelism")
    peak = bf16_peak(single[0].device) or max(one.product_flops_per_s for one in single)
    device = replace(device, flops_per_s=peak, fixed_bytes=float(np.mean([one.fixed_bytes for one in single])))
    assumed = np.array([1 / getattr(device.efficiency, part) for part in PARTS])
    rows, constants = [], []
    for one in single:
        base = predicted_seconds(one, _with_costs(device, np.zeros(len(PARTS))))
        parts = [predicted_seconds(one, _with_costs(device, unit)) - base for unit in np.eye(len(PARTS))]
        rows.append(np.array(parts) / one.seconds)
        constants.append(base / one.seconds)
    matrix = np.vstack([*rows, PRIOR * np.diag(1 / assumed)])
    target = np.concatenate([1 - np.array(constants), np.full(len(PARTS), PRIOR)])
    return _with_costs(device, _nonnegative_least_squares(matrix, target, assumed))


def predicted_seconds(run: Measured, device: Device, gpus_per_node: int = 8) -> float:
    """Of the same update on the device: the reference's pass, if there is one, and forward and backward.

    A CPU's clock is the processor time of the busiest rank, which does not count what a stage waits.
    """
    args = (run.job, run.layout, device, gpus_per_node, pipeline_seconds if run.on_gpu else busiest_seconds)
    return reference_seconds(*args) + update_seconds(*args)


def predicted_bytes(run: Measured, device: Device) -> float:
    """Of the fullest rank."""
    return max(one.total for one in training_memory(run.job, run.layout, device))


def _with_costs(device: Device, costs: np.ndarray) -> Device:
    """With these reciprocals of efficiencies; 0 is no time at all."""
    rates = {part: 1 / cost if cost > 0 else np.inf for part, cost in zip(PARTS, costs, strict=True)}
    efficiency = device.efficiency
    others = {"memory": efficiency.memory, "link": efficiency.link, "network": efficiency.network}
    return replace(device, efficiency=Efficiency(**rates, **others))


def _nonnegative_least_squares(matrix: np.ndarray, target: np.ndarray, start: np.ndarray) -> np.ndarray:
    """argmin |matrix x - target|^2 with x >= 0, by coordinate descent."""
    gram, moment, solution = matrix.T @ matrix, matrix.T @ target, start.copy()
    for _ in range(10_000):
        before = solution.copy()
        for index in range(len(solution)):
            gradient = gram[index] @ solution - moment[index]
            solution[index] = max(0.0, solution[index] - gradient / gram[index, index])
        if np.abs(solution - before).max() <= 1e-12 * np.abs(solution).max():
            break
    return solution
