"""A small job runner: starts jobs in worker processes as their dependencies finish, and remembers what is done.

The parent process owns one pipe per worker process. It sends a job, waits on all pipes, and marks a job as done once
its worker reports success. Workers are reused, because importing the libraries takes longer than many jobs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_POLL_S = 1.0
_STATUS_INTERVAL_S = 20.0
_STOP_TIMEOUT_S = 60.0  # how long a stopped training job may take to write its checkpoint


class JobFailed(RuntimeError):
    """A job raised an exception or its process died; the message names the job's log."""


@dataclass(frozen=True, slots=True)
class Job:
    """A unit of work that runs once.

    Attributes:
        run: called in a worker process, so the function and its arguments must be picklable.
        after: names of the jobs that must finish first.
        seconds: expected duration on one core; used only by the progress bar.
        num_steps: number of training steps; 0 if the job trains nothing.
        metrics: file to which a training job appends one line per step.
    """

    name: str
    run: Callable[[], None]
    after: tuple[str, ...] = ()
    seconds: float = 1.0
    num_steps: int = 0
    metrics: Path | None = None

    def progress(self) -> float:
        """Return the finished fraction of a running job, in [0, 1)."""
        if self.metrics is None or not self.metrics.exists():
            return 0.0
        with self.metrics.open("rb") as file:
            return min(sum(1 for _ in file) / self.num_steps, 0.99)


class Record:
    """The persistent state of a demo directory.

    done/NAME.json holds the time that a finished job took, logs/NAME.log its output, calls.jsonl the duration of each
    call of the demo, and `fingerprint` the digest of everything that the results depend on.
    """

    def __init__(self, folder: Path) -> None:
        self._done, self._logs = folder / "done", folder / "logs"
        self._calls, self._fingerprint = folder / "calls.jsonl", folder / "fingerprint"
        for directory in (self._done, self._logs):
            directory.mkdir(parents=True, exist_ok=True)

    def matches(self, fingerprint: str) -> bool:
        """Return whether the results in this directory have the fingerprint; a new directory takes it over."""
        if not self._fingerprint.exists():
            if any(self._done.iterdir()):
                return False
            self._fingerprint.write_text(fingerprint, encoding="utf-8")
        return self._fingerprint.read_text(encoding="utf-8") == fingerprint

    def log(self, job: Job) -> Path:
        return self._logs / f"{job.name}.log"

    def is_done(self, job: Job) -> bool:
        return self._file(job).exists()

    def mark_done(self, job: Job, spent: dict[str, float]) -> None:
        """Store the time of the attempt that finished the job; interrupted attempts do not count."""
        self._file(job).write_text(json.dumps(spent) + "\n", encoding="utf-8")

    def spent(self, jobs: Iterable[Job]) -> dict[str, dict[str, float]]:
        """Return wall_s and cpu_s of each finished job."""
        return {job.name: json.loads(self._file(job).read_text()) for job in jobs if self.is_done(job)}

    @contextmanager
    def timed_call(self) -> Iterator[None]:
        """Record how long the body takes, also if it is interrupted."""
        start_s = time.monotonic()
        try:
            yield
        finally:
            with self._calls.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"wall_s": time.monotonic() - start_s}) + "\n")

    def call_seconds(self) -> list[float]:
        """Return the wall-clock seconds of each call that ran at least one job."""
        return [json.loads(line)["wall_s"] for line in self._calls.read_text(encoding="utf-8").splitlines()]

    def _file(self, job: Job) -> Path:
        return self._done / f"{job.name}.json"


def run_jobs(jobs: Sequence[Job], record: Record, num_workers: int) -> None:
    """Run all jobs that are not done. If several could start, the first in the list starts.

    Raises:
        JobFailed: a job raised an exception or its process died. The other jobs are stopped (training jobs write a
            checkpoint first), and the next call with the same arguments continues.
    """
    if missing := {name for job in jobs for name in job.after} - {job.name for job in jobs}:
        raise ValueError(f"jobs depend on unknown jobs: {', '.join(sorted(missing))}")
    pending = [job for job in jobs if not record.is_done(job)]
    if not pending:
        return
    done = {job.name for job in jobs} - {job.name for job in pending}
    workers: list[_Worker] = []
    with record.timed_call(), _display(jobs, done) as display:
        try:
            while pending or any(worker.job for worker in workers):
                for job in [job for job in pending if set(job.after) <= done]:
                    idle = next((worker for worker in workers if worker.job is None), None)
                    if idle is None and len(workers) < num_workers:
                        workers.append(idle := _Worker())
                    if idle is None:
                        break
                    idle.start(job, record.log(job))
                    pending.remove(job)
                for worker in _Worker.finished(workers):
                    job, spent = worker.result()
                    record.mark_done(job, spent)
                    done.add(job.name)
                display.update(done, [worker.job for worker in workers if worker.job])
        finally:
            # First stop all of them, then wait: they write their checkpoints at the same time.
            for worker in workers:
                worker.stop()
            for worker in workers:
                worker.join()


class _Worker:
    """The parent's handle to a process that runs one job after another."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # otherwise the parent would not see the end of the pipe when the worker dies
        self._log: Path | None = None
        self.job: Job | None = None

    def start(self, job: Job, log: Path) -> None:
        self.job, self._log = job, log
        self._connection.send((job.run, log))

    @staticmethod
    def finished(workers: Sequence[_Worker]) -> list[_Worker]:
        """Wait up to a second, then return the workers whose job or process has ended."""
        busy = {worker._connection: worker for worker in workers if worker.job}
        return [busy[ready] for ready in wait(list(busy), timeout=_POLL_S)]  # type: ignore[index]

    def result(self) -> tuple[Job, dict[str, float]]:
        """Return the finished job and the time it took.

        Raises:
            JobFailed: the job raised an exception, or the process died.
        """
        job, log = self.job, self._log
        assert job is not None and log is not None
        self.job = None
        try:
            outcome = self._connection.recv()
        except EOFError:
            self._process.join()
            raise JobFailed(f"{job.name}: its process died with code {self._process.exitcode}; see {log}") from None
        if isinstance(outcome, str):
            raise JobFailed(f"{job.name}: {outcome}\n  {_last_line(log)}\n  full log: {log}")
        return job, outcome

    def stop(self) -> None:
        """Close the pipe, which ends an idle process, and terminate a busy one; training saves a checkpoint first."""
        self._connection.close()
        if self.job is not None:
            self._process.terminate()

    def join(self) -> None:
        self._process.join(_STOP_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()


def _serve(connection: Connection) -> None:
    """Run jobs in the worker process until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and stops the workers
    while True:
        try:
            run, log = connection.recv()
        except EOFError:
            return
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        _redirect_output(log)
        try:
            run()
        except Exception as error:  # the error of a job is its outcome
            traceback.print_exc()
            outcome: dict[str, float] | str = str(error)
        else:
            outcome = {"wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s}
        with suppress(BrokenPipeError):  # the parent process is gone
            connection.send(outcome)


def _redirect_output(log: Path) -> None:
    """Send everything that this process prints from now on, including C libraries, to the log."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)


def _last_line(log: Path) -> str:
    """Return the last line of a log; for a traceback this is the error."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1] if lines else ""


class _Display:
    """Progress of all jobs: a bar on a terminal, otherwise a status line every 20 seconds."""

    def __init__(self, jobs: Sequence[Job], done: Iterable[str], progress: Progress, task: TaskID) -> None:
        self._jobs = {job.name: job for job in jobs}
        self._total = sum(job.seconds for job in jobs)
        self._known_done = set(done)
        self._progress, self._task = progress, task
        self._start_s = self._last_status_s = time.monotonic()

    def update(self, done: set[str], running: Sequence[Job]) -> None:
        console = self._progress.console
        elapsed_s = time.monotonic() - self._start_s
        for name in sorted(done - self._known_done):
            console.print(f"[{elapsed_s:4.0f} s] done: {name}", highlight=False, markup=False)
        self._known_done |= done
        finished = sum(self._jobs[name].seconds for name in done)
        fraction = (finished + sum(job.seconds * job.progress() for job in running)) / self._total
        now = ", ".join(f"{job.name} {job.progress():.0%}" if job.num_steps else job.name for job in running)
        self._progress.update(self._task, completed=fraction, description=now)
        if not console.is_terminal and running and time.monotonic() - self._last_status_s >= _STATUS_INTERVAL_S:
            self._last_status_s = time.monotonic()
            console.print(f"[{elapsed_s:4.0f} s] {fraction:4.0%}  running: {now}", highlight=False, markup=False)


@contextmanager
def _display(jobs: Sequence[Job], done: Iterable[str]) -> Iterator[_Display]:
    console = Console(stderr=True)
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield _Display(jobs, done, progress, progress.add_task("", total=1.0))
