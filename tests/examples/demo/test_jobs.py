"""The demo's job runner."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
from demo.jobs import Job, JobFailed, Record, run_jobs


def test_jobs_run_once_in_the_order_of_their_dependencies(tmp_path: Path) -> None:
    first = Job("first", partial(os.mkdir, tmp_path / "made"))
    second = Job("second", partial(Path.touch, tmp_path / "made" / "file"), after=("first",))
    record = Record(tmp_path / "record")
    run_jobs([second, first], record, num_workers=2)
    assert (tmp_path / "made" / "file").exists()
    assert set(record.spent([first, second])) == {"first", "second"}
    run_jobs([second, first], record, num_workers=2)  # a second mkdir would fail
    assert len(record.call_seconds()) == 1


def test_a_failed_job_is_named_and_runs_again(tmp_path: Path) -> None:
    record = Record(tmp_path / "record")
    jobs = [Job("fine", partial(Path.touch, tmp_path / "fine")), Job("fails", partial(os.mkdir, tmp_path / "a" / "b"))]
    with pytest.raises(JobFailed, match=r"fails: .*No such file.*(?s:.)*fails\.log"):
        run_jobs(jobs, record, num_workers=1)
    (tmp_path / "a").mkdir()
    run_jobs(jobs, record, num_workers=1)
    assert all(record.is_done(job) for job in jobs)
    assert len(record.call_seconds()) == 2
    assert min(record.call_seconds()) > 0


def test_a_process_that_dies_is_a_failed_job(tmp_path: Path) -> None:
    with pytest.raises(JobFailed, match="died with code 3"):
        run_jobs([Job("dies", partial(os._exit, 3))], Record(tmp_path), num_workers=1)


def test_unknown_dependencies_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown jobs: absent"):
        run_jobs([Job("waits", os.getpid, after=("absent",))], Record(tmp_path), num_workers=1)


def test_progress_is_the_fraction_of_training_steps(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    job = Job("train", os.getpid, num_steps=4, metrics=metrics)
    assert job.progress() == 0.0
    metrics.write_text("{}\n{}\n")
    assert job.progress() == 0.5
    metrics.write_text("{}\n" * 4)
    assert job.progress() == 0.99  # not done before the job has ended


def test_a_record_belongs_to_one_fingerprint(tmp_path: Path) -> None:
    record = Record(tmp_path)
    assert record.matches("one") and record.matches("one")
    assert not record.matches("two")
