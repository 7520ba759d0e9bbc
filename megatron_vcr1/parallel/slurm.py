"""The environment variables that torchrun sets, derived from srun's, so that `srun vcr1 train` needs no launcher."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import product

_FIRST_PORT, _NUM_PORTS = 10_000, 19_000  # below SGLang's servers (30000 and up) and the usual ephemeral ports


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task of an srun step.

    Returns an empty dictionary if this process is not a task of an srun step, if it is the only task of its step, or
    if another launcher has set RANK (torchrun, also inside srun).

    MASTER_ADDR and MASTER_PORT keep their values if they are set: set MASTER_ADDR where a node cannot be reached by
    its name. The port is computed from the job and the step, so all tasks agree on it, and two steps or jobs on one
    node rarely collide.

    Args:
        environment: environment variables of this process.

    Raises:
        ValueError: a Slurm variable cannot be parsed.
    """
    if "RANK" in environment or "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return {}
    num_tasks = int(environment["SLURM_STEP_NUM_TASKS"])
    if num_tasks == 1:
        return {}
    tasks_per_node = expand_counts(environment["SLURM_STEP_TASKS_PER_NODE"])
    # With srun --gpus-per-task, each task sees only its own GPU, which CUDA then numbers 0.
    sees_one_gpu = re.fullmatch(r"[^,]+", environment.get("CUDA_VISIBLE_DEVICES", ""))
    port = _FIRST_PORT + (int(environment["SLURM_JOB_ID"]) * 8 + int(environment["SLURM_STEP_ID"])) % _NUM_PORTS
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(num_tasks),
        "LOCAL_RANK": "0" if sees_one_gpu else environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_per_node[int(environment["SLURM_NODEID"])]),
        "MASTER_ADDR": environment.get("MASTER_ADDR") or expand_hosts(environment["SLURM_STEP_NODELIST"])[0],
        "MASTER_PORT": environment.get("MASTER_PORT") or str(port),
    }


def expand_hosts(text: str) -> list[str]:
    """Expand a Slurm host list: "a[08-10,12],b" is a08, a09, a10, a12, b. A name may contain several brackets.

    Raises:
        ValueError: `text` is not a Slurm host list.
    """
    return [host for name in _split_at_commas(text) for host in _expand_name(name)]


def expand_counts(text: str) -> list[int]:
    """Expand Slurm's run-length notation of one count per node: "8(x2),4" is 8, 8, 4.

    Raises:
        ValueError: `text` is not in that notation.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"{text!r} is not a Slurm list of counts such as 8(x2),4")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _split_at_commas(text: str) -> Iterator[str]:
    """Split at the commas outside of brackets."""
    names = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if ",".join(names) != text or not names:
        raise ValueError(f"{text!r} is not a Slurm host list such as node[01-04,7],login")
    return iter(names)


def _expand_name(name: str) -> Iterator[str]:
    pieces = re.split(r"\[([^\]]*)\]", name)  # text, numbers, text, numbers, ..., text
    choices = [list(_expand_numbers(piece)) if index % 2 else [piece] for index, piece in enumerate(pieces)]
    return ("".join(parts) for parts in product(*choices))


def _expand_numbers(text: str) -> Iterator[str]:
    """Expand "08-10,12" to 08, 09, 10, 12; the numbers keep their leading zeros."""
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ValueError(f"[{text}] is not a Slurm list of numbers such as [08-10,12]")
        first, last = match[1], match[2] or match[1]
        yield from (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
