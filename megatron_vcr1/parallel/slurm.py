"""What torchrun would tell its ranks, from srun's variables: `srun vcr1 train` needs no other launcher."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import product

_FIRST_PORT, _NUM_PORTS = 10_000, 19_000  # below SGLang's servers (30000 and up) and what systems hand out themselves


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a task of an srun step.

    Empty if this is no such task, or the only one of its step, or another launcher has set RANK already (torchrun, also
    inside srun). Of MASTER_ADDR and MASTER_PORT, what is set already stays: name an address where a node's name is not
    the one to reach it by. The port follows from the job and the step, so that all tasks agree on it, and steps of
    jobs on one node hardly ever share it.

    Args:
        environment: of the process.

    Raises:
        ValueError: a variable of Slurm has a form that is not Slurm's.
    """
    if "RANK" in environment or "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return {}
    num_tasks = int(environment["SLURM_STEP_NUM_TASKS"])
    if num_tasks == 1:
        return {}
    tasks_per_node = expand_counts(environment["SLURM_STEP_TASKS_PER_NODE"])
    # With srun --gpus-per-task a task sees its own GPU only, as the first one.
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
    """The hosts of a Slurm list: "a[08-10,12],b" is a08, a09, a10, a12, b; a name may hold several brackets.

    Raises:
        ValueError: the text is no such list.
    """
    return [host for name in _split(text) for host in _expand_name(name)]


def expand_counts(text: str) -> list[int]:
    """Slurm's short form of a number a node: "8(x2),4" is 8, 8, 4.

    Raises:
        ValueError: the text has another form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(f"{text!r} is no list of counts such as 8(x2),4")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _split(text: str) -> Iterator[str]:
    """At the commas outside of brackets."""
    names = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text)
    if ",".join(names) != text or not names:
        raise ValueError(f"{text!r} is no list of hosts such as node[01-04,7],login")
    return iter(names)


def _expand_name(name: str) -> Iterator[str]:
    pieces = re.split(r"\[([^\]]*)\]", name)  # text, numbers, text, numbers, ..., text
    choices = [list(_numbers(piece)) if place % 2 else [piece] for place, piece in enumerate(pieces)]
    return ("".join(parts) for parts in product(*choices))


def _numbers(text: str) -> Iterator[str]:
    """ "08-10,12" is 08, 09, 10, 12."""
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ValueError(f"[{text}] is no list of numbers such as [08-10,12]")
        first, last = match[1], match[2] or match[1]
        yield from (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
