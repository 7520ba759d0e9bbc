"""A real Slurm cluster with three nodes, shared by all tests of a session.

Without Slurm's daemons or root, the tests are skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.limits import HANG_S
from tests.ports import free_ports

ROOT = Path(__file__).parents[2]
CLUSTER = Path(__file__).with_name("cluster.sh")
FINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}


@dataclass(frozen=True)
class Cluster:
    """Client of the cluster whose files are in `folder`."""

    folder: Path

    def call(self, *command: object, cwd: Path | None = None, **environment: str) -> str:
        """Run a command, which must succeed, and return its output."""
        # The tests themselves may run inside a Slurm job.
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        clean |= {"SLURM_CONF": str(self.folder / "slurm.conf"), **environment}
        done = subprocess.run(
            list(map(str, command)), cwd=cwd, env=clean, capture_output=True, text=True, timeout=HANG_S
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, folder: Path, *arguments: object, **environment: str) -> str:
        """Submit a job with sbatch from a folder and return its id."""
        return self.call("sbatch", "--parsable", *arguments, cwd=folder, **environment).strip()

    def fields(self, job: str) -> dict[str, str]:
        """Return the fields of `scontrol show job`; retry, as the controller may drop connections while a node dies."""
        for retries_left in (4, 3, 2, 1, 0):
            try:
                text = self.call("scontrol", "--oneliner", "show", "job", job)
                break
            except AssertionError:
                if not retries_left:
                    raise
                time.sleep(0.5)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, job: str, *, until: object = None, timeout_s: float = HANG_S) -> dict[str, str]:
        """Wait until the job has ended, or until `until(fields)` is true."""
        end = time.monotonic() + timeout_s
        while True:
            fields = self.fields(job)
            if until(fields) if callable(until) else fields["JobState"] in FINAL_STATES:
                return fields
            assert time.monotonic() < end, f"job {job} is still {fields['JobState']} ({fields.get('Reason')})"
            time.sleep(0.3)

    def cut_power(self, node: str) -> None:
        """Kill a node and everything that runs on it, and mark it as down."""
        self.call("bash", CLUSTER, self.folder, "cut-power", node)
        self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def boot(self, node: str) -> None:
        self.call("bash", CLUSTER, self.folder, "boot", node)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if os.geteuid() != 0 or not all(map(shutil.which, ("slurmctld", "slurmd", "munged", "sbatch"))):
        pytest.skip("needs root and Debian's slurmctld, slurmd, slurm-client and munge")
    folder = Path(tempfile.mkdtemp(prefix="vcr1-slurm-", dir="/tmp"))  # a short path, because it contains Unix sockets
    folder.chmod(0o755)
    try:
        environment = os.environ | {"BASE_PORT": str(free_ports(4))}  # of slurmctld and three slurmd
        command = ["bash", CLUSTER, folder, "start"]
        started = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_S)
        assert started.returncode == 0, started.stderr
        yield Cluster(folder)
    finally:
        subprocess.run(["bash", CLUSTER, folder, "stop"], timeout=HANG_S)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def submit_dir(tmp_path: Path) -> Path:
    """A directory to submit jobs from. It has examples/, tools/ and, as .venv, the environment of the tests."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "tools").symlink_to(ROOT / "tools")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    return tmp_path
