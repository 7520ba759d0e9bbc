"""Jobs in several processes: in order of their dependencies, each once, with a log, shown while they run."""

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
_STATUS_EVERY_S = 20.0
_PATIENCE_S = 60.0  # for training to save itself


class JobFailed(RuntimeError):
    """A job ended with an error; the message names its log."""


@dataclass(frozen=True, slots=True)
class Job:
    """Something to do once.

    Attributes:
        run: called in another process, so it and its arguments are pickled.
        after: names of the jobs that must be done before.
        seconds: what it is expected to take on one core; for the progress bar alone.
        steps: of a training run: how many.
        metrics: of a training run: the file that gets a line a step.
    """

    name: str
    run: Callable[[], None]
    after: tuple[str, ...] = ()
    seconds: float = 1.0
    steps: int = 0
    metrics: Path | None = None

    def share_done(self) -> float:
        """Of a job that is running, in [0, 1)."""
        if self.metrics is None or not self.metrics.exists():
            return 0.0
        with self.metrics.open("rb") as file:
            return min(sum(1 for _ in file) / self.steps, 0.99)


class Record:
    """What is done, in a folder: done/NAME.json with seconds, logs/NAME.log, by which recipe, and in which calls."""

    def __init__(self, folder: Path) -> None:
        self._done, self._logs = folder / "done", folder / "logs"
        self._calls, self._recipe = folder / "calls.jsonl", folder / "recipe"
        for one in (self._done, self._logs):
            one.mkdir(parents=True, exist_ok=True)

    def is_of(self, recipe: str) -> bool:
        """Whether what was begun here follows the recipe that the jobs follow now; a new folder does."""
        if not self._recipe.exists():
            if any(self._done.iterdir()):
                return False
            self._recipe.write_text(recipe, encoding="utf-8")
        return self._recipe.read_text(encoding="utf-8") == recipe

    def log(self, job: Job) -> Path:
        return self._logs / f"{job.name}.log"

    def is_done(self, job: Job) -> bool:
        return self._file(job).exists()

    def mark(self, job: Job, spent: dict[str, float]) -> None:
        """Note what it took: the attempt that finished it, if others were interrupted."""
        self._file(job).write_text(json.dumps(spent) + "\n", encoding="utf-8")

    def spent(self, jobs: Iterable[Job]) -> dict[str, dict[str, float]]:
        """wall_s and cpu_s of each job that is done."""
        return {job.name: json.loads(self._file(job).read_text()) for job in jobs if self.is_done(job)}

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around jobs: notes how long this call ran them, also if it is interrupted."""
        start_s = time.monotonic()
        try:
            yield
        finally:
            with self._calls.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"wall_s": time.monotonic() - start_s}) + "\n")

    def calls(self) -> list[float]:
        """Wall-clock seconds of each call that had something to do."""
        return [json.loads(line)["wall_s"] for line in self._calls.read_text(encoding="utf-8").splitlines()]

    def _file(self, job: Job) -> Path:
        return self._done / f"{job.name}.json"


def run_jobs(jobs: Sequence[Job], record: Record, num_workers: int) -> None:
    """Run what is not done yet; earlier jobs in the list go first where several could start.

    Raises:
        JobFailed: a job raised or its process died. The others save themselves, and the same call goes on later.
    """
    if missing := {name for job in jobs for name in job.after} - {job.name for job in jobs}:
        raise ValueError(f"jobs wait for {', '.join(sorted(missing))}, which are none of them")
    left = [job for job in jobs if not record.is_done(job)]
    if not left:
        return
    done = {job.name for job in jobs} - {job.name for job in left}
    workers: list[_Worker] = []
    with record.call(), _display(jobs, done) as display:
        try:
            while left or any(worker.job for worker in workers):
                for job in [job for job in left if set(job.after) <= done]:
                    idle = next((worker for worker in workers if worker.job is None), None)
                    if idle is None and len(workers) < num_workers:
                        workers.append(idle := _Worker())
                    if idle is None:
                        break
                    idle.start(job, record.log(job))
                    left.remove(job)
                for worker in _Worker.finished(workers):
                    job, spent = worker.result()
                    record.mark(job, spent)
                    done.add(job.name)
                display.update(done, [worker.job for worker in workers if worker.job])
        finally:
            for worker in workers:
                worker.stop()
            for worker in workers:
                worker.join()


class _Worker:
    """A process that runs one job after the other, with the libraries that it has imported once."""

    def __init__(self) -> None:
        context = get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._log: Path | None = None
        self.job: Job | None = None

    def start(self, job: Job, log: Path) -> None:
        self.job, self._log = job, log
        self._connection.send((job.run, log))

    @staticmethod
    def finished(workers: Sequence[_Worker]) -> list[_Worker]:
        """Those whose job has ended, or whose process has, after waiting a moment for the first."""
        busy = {worker._connection: worker for worker in workers if worker.job}
        return [busy[ready] for ready in wait(list(busy), timeout=_POLL_S)]  # type: ignore[index]

    def result(self) -> tuple[Job, dict[str, float]]:
        """The job that has ended and what it took. Raises JobFailed."""
        job, log = self.job, self._log
        assert job is not None and log is not None
        self.job = None
        try:
            outcome = self._connection.recv()
        except EOFError:
            self._process.join()
            raise JobFailed(f"{job.name}: its process died with code {self._process.exitcode}; see {log}") from None
        if isinstance(outcome, str):
            raise JobFailed(f"{job.name}: {outcome}\n  {_last_line(log)}\n  more in {log}")
        return job, outcome

    def stop(self) -> None:
        """An idle process ends by itself when the pipe is closed; training saves itself first."""
        self._connection.close()
        if self.job is not None:
            self._process.terminate()

    def join(self) -> None:
        self._process.join(_PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()


def _serve(connection: Connection) -> None:
    """In the other process: run jobs until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    while True:
        try:
            run, log = connection.recv()
        except EOFError:
            return
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        _print_to(log)
        try:
            run()
        except Exception as error:
            traceback.print_exc()
            outcome: dict[str, float] | str = str(error)
        else:
            outcome = {"wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s}
        with suppress(BrokenPipeError):  # the parent has gone
            connection.send(outcome)


def _print_to(log: Path) -> None:
    """From now on, what this process prints goes to a file, and to nobody's terminal."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)


def _last_line(log: Path) -> str:
    """What it said before it gave up; of a traceback the error."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1] if lines else ""


class _Display:
    """Progress over all jobs; for a terminal a bar, for a file a line now and then."""

    def __init__(self, jobs: Sequence[Job], done: Iterable[str], progress: Progress, task: TaskID) -> None:
        self._jobs = {job.name: job for job in jobs}
        self._total = sum(job.seconds for job in jobs)
        self._known_done = set(done)
        self._progress, self._task = progress, task
        self._start_s = self._last_line_s = time.monotonic()

    def update(self, done: set[str], running: Sequence[Job]) -> None:
        console = self._progress.console
        elapsed_s = time.monotonic() - self._start_s
        for name in sorted(done - self._known_done):
            console.print(f"[{elapsed_s:4.0f} s] done: {name}", highlight=False, markup=False)
        self._known_done |= done
        finished = sum(self._jobs[name].seconds for name in done)
        share = (finished + sum(job.seconds * job.share_done() for job in running)) / self._total
        now = ", ".join(f"{job.name} {job.share_done():.0%}" if job.steps else job.name for job in running)
        self._progress.update(self._task, completed=share, description=now)
        if not console.is_terminal and running and time.monotonic() - self._last_line_s >= _STATUS_EVERY_S:
            self._last_line_s = time.monotonic()
            console.print(f"[{elapsed_s:4.0f} s] {share:4.0%}  running: {now}", highlight=False, markup=False)


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
