"""Fits the efficiencies of a device to measured updates: the JSON files of `vcr1 benchmark train`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vcr1.errors import UserError
from megatron_vcr1.model.flops import bf16_peak
from megatron_vcr1.model.presets import model_config
from megatron_vcr1.planning.devices import Device
from megatron_vcr1.planning.job import Job, Layout
from megatron_vcr1.planning.memory import training_memory
from megatron_vcr1.planning.timing import busiest_seconds, pipeline_seconds, reference_seconds, update_seconds
from megatron_vcr1.text_files import read_json

PARTS = ("text", "vision", "attention", "head")
"""The efficiencies that are fitted."""
PRIOR_WEIGHT = 0.005  # weight of the assumed efficiencies, which matter for parts that the runs hardly measure


@dataclass(frozen=True, slots=True)
class Measured:
    """One measured update."""

    name: str
    job: Job
    layout: Layout
    seconds: float
    peak_bytes: float  # of the rank with the highest peak
    fixed_bytes: float  # memory in use before the model is built: libraries, CUDA context
    matmul_flops_per_s: float
    device: str

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @classmethod
    def from_file(cls, path: Path) -> Measured:
        """Read a result of `vcr1 benchmark train --json`.

        Raises:
            UserError: the file is not such a result.
        """
        try:
            raw = read_json(path)
            return cls._from_result(path.stem, raw, raw["case"], raw["sides"]["ours"])
        except (OSError, ValueError, KeyError, TypeError) as error:  # what reading JSON of another form raises
            raise UserError(
                f"{path}: not a result of vcr1 benchmark train --json ({type(error).__name__}: {error})"
            ) from None

    @classmethod
    def _from_result(cls, name: str, raw: dict[str, Any], case: dict[str, Any], ours: dict[str, Any]) -> Measured:
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
        groups = min(case["microbatch_tokens"] // job.group_tokens, job.prompts_per_step // raw["replicas"])
        layout = Layout(
            tensor=case["tensor"],
            context=case["context"],
            pipeline=case["pipeline"],
            replicas=raw["replicas"],
            sequence_parallel=case["sequence_parallel"],
            first_stage_layers=case["first_stage_layers"],
            recompute=case["recompute"],
            groups_per_microbatch=max(1, groups),
        )
        # On a CPU that other programs use too, CPU time varies less than wall-clock time.
        clock = ours["seconds" if raw["device"] != "cpu" else "cpu_seconds"]
        return cls(
            name=name,
            job=job,
            layout=layout,
            seconds=float(np.median(clock)),
            peak_bytes=ours["peak_bytes"],
            fixed_bytes=ours["libraries_bytes"],
            matmul_flops_per_s=ours["matmul_flops_per_s"],
            device=raw["device"],
        )


def calibrate(device: Device, runs: Sequence[Measured]) -> Device:
    """Fit the device's efficiencies and fixed memory to the runs on a single rank.

    The predicted seconds are a sum over parts of FLOPs / (peak x efficiency), so they are linear in the reciprocals of
    the efficiencies. These are fitted by least squares of the relative errors, with a lower bound of 0 and a weak pull
    towards the device's own values (`PRIOR_WEIGHT`).

    The peak rate of a GPU is its published one; that of a CPU is its fastest measured matmul.

    Raises:
        UserError: a run was measured on another device, or no run was on a single rank.
    """
    if others := sorted({run.device for run in runs if not _is_measured_on(run, device)}):
        raise UserError(
            f"--calibrate: the results were measured on {', '.join(others)}, not on {device.name}: set --gpu to the "
            "device that was measured"
        )
    single = [run for run in runs if run.layout.num_gpus == 1]
    if not single:
        raise UserError("calibration needs a run on one GPU, without tensor, pipeline or data parallelism")
    device = replace(device, fixed_bytes=float(np.mean([run.fixed_bytes for run in single])))
    if device.is_cpu:
        device = replace(device, flops_per_s=max(run.matmul_flops_per_s for run in single))
    assumed = np.array([1 / getattr(device.efficiency, part) for part in PARTS])
    rows, constants = [], []
    for run in single:
        # The prediction is affine in the costs: evaluate it at 0 and at the unit vectors.
        base = predicted_seconds(run, _with_costs(device, np.zeros(len(PARTS))))
        parts = [predicted_seconds(run, _with_costs(device, unit)) - base for unit in np.eye(len(PARTS))]
        rows.append(np.array(parts) / run.seconds)
        constants.append(base / run.seconds)
    matrix = np.vstack([*rows, PRIOR_WEIGHT * np.diag(1 / assumed)])
    target = np.concatenate([1 - np.array(constants), np.full(len(PARTS), PRIOR_WEIGHT)])
    return _with_costs(device, _nonnegative_least_squares(matrix, target, assumed))


def _is_measured_on(run: Measured, device: Device) -> bool:
    """Whether a run's device is the planner's: the same model of GPU with the same peak, such as SXM and not PCIe."""
    if device.is_cpu or not run.on_gpu:
        return device.is_cpu and not run.on_gpu
    model = device.name.split()[0]
    return re.search(rf"\b{model}\b", run.device) is not None and bf16_peak(run.device) == device.flops_per_s


def predicted_seconds(run: Measured, device: Device) -> float:
    """Predict the seconds of a measured update: the reference's forward pass, if there is one, and the update.

    The clock of a CPU run is the CPU time of the busiest rank, which does not include waiting for other stages.
    """
    args = (run.job, run.layout, device, pipeline_seconds if run.on_gpu else busiest_seconds)
    return reference_seconds(*args) + update_seconds(*args)


def predicted_bytes(run: Measured, device: Device) -> float:
    """Predict the peak memory of the fullest rank."""
    return max(stage.total for stage in training_memory(run.job, run.layout, device))


def _with_costs(device: Device, costs: np.ndarray) -> Device:
    """Replace the fitted efficiencies by the reciprocals of `costs`; a cost of 0 means that the part takes no time."""
    rates = {part: 1 / cost if cost > 0 else np.inf for part, cost in zip(PARTS, costs, strict=True)}
    return replace(device, efficiency=replace(device.efficiency, **rates))


def _nonnegative_least_squares(matrix: np.ndarray, target: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Minimize |matrix x - target|^2 subject to x >= 0 by coordinate descent."""
    gram, moment, solution = matrix.T @ matrix, matrix.T @ target, start.copy()
    for _ in range(10_000):
        before = solution.copy()
        for index in range(len(solution)):
            gradient = gram[index] @ solution - moment[index]
            solution[index] = max(0.0, solution[index] - gradient / gram[index, index])
        if np.abs(solution - before).max() <= 1e-12 * np.abs(solution).max():
            break
    return solution
