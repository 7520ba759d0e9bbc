"""Profiles: a trace of torch's profiler with the phases and what runs beside them, and a table of where time went."""

from __future__ import annotations

import gzip
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megatron_vcr1 import timeline
from megatron_vcr1.config.training_sections import ProfileSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.timeline import Span
from megatron_vcr1.training.metrics import PHASES

logger = logging.getLogger(__name__)

TRAINING_PHASES = ("reference", "update")
NUM_ROWS = 20
_EVENTS_START = '"traceEvents": ['


class StepProfile:
    """The profile of the steps that [profile] names, counted from this start."""

    def __init__(self, section: ProfileSection, folder: Path) -> None:
        """Raises UserError if a rank is named that the job does not have."""
        if section.enabled and not set(section.ranks) <= set(range(dist.get_world_size())):
            ranks = ", ".join(map(str, section.ranks))
            raise UserError(f"profile.ranks = {ranks}: the job has ranks 0 to {dist.get_world_size() - 1}")
        self._section = section
        self._is_wanted = section.enabled and dist.get_rank() in section.ranks
        self._folder = folder
        self._num_steps = 0  # begun
        self._open = ExitStack()

    def next_step(self) -> None:
        """A step begins: start the profile before its first one, write it when its last one is over."""
        self._num_steps += 1
        if self._is_wanted and self._num_steps == self._section.first_step:
            name = f"rank_{dist.get_rank()}"
            self._open.enter_context(profiled(self._folder, name))
        if self._num_steps == self._section.last_step + 1:
            self.close()

    def close(self) -> None:
        """Write the profile if one is under way."""
        self._open.close()
        if self._is_wanted and self._num_steps < self._section.first_step:
            logger.warning(
                "no profile: the run ended before profile.first_step = %d of this start", self._section.first_step
            )


@contextmanager
def profiled(folder: Path, name: str) -> Iterator[None]:
    """Profile the with-block, in this thread and beside it, into folder/NAME.json.gz and folder/NAME.txt.

    The trace opens in https://ui.perfetto.dev and chrome://tracing.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler, timeline.recording() as spans:
        start_ns = time.time_ns()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        end_ns = time.time_ns()
    window = [clipped for span in spans if (clipped := _clipped(span, start_ns, end_ns)) is not None]
    folder.mkdir(parents=True, exist_ok=True)
    trace = folder / f"{name}.json.gz"
    _write_trace(profiler, window, trace)
    table = "\n\n".join((phase_table(window, (end_ns - start_ns) / 1e9), operator_table(profiler.key_averages())))
    (folder / f"{name}.txt").write_text(table + "\n", encoding="utf-8")
    logger.info("profile: %s\n%s", trace, table)


def phase_table(spans: Sequence[Span], total_s: float) -> str:
    """Seconds and share of every phase of the main thread, and what ran beside it.

    Args:
        spans: within the profile, of all tracks.
        total_s: length of the profile; what is in no phase is "other".
    """
    main = {
        phase: merged([span for span in spans if span.track == "MainThread" and span.name == phase]) for phase in PHASES
    }
    seconds = {phase: length_s(main[phase]) for phase in PHASES if phase != "total" and main[phase]}
    seconds["other"] = total_s - sum(seconds.values())
    lines = [f"{'phase':<24}{'seconds':>10}{'share':>9}"]
    seconds["total"] = total_s
    lines += [f"{phase:<24}{took:>10.3f}{took / total_s:>9.1%}" for phase, took in seconds.items()]
    tracks = sorted({span.track for span in spans} - {"MainThread"})
    if not tracks:
        return "\n".join(lines)
    training = merged([span for phase in TRAINING_PHASES for span in main[phase]])
    waiting = merged([*main["decode"], *main["rollout"]])
    lines += ["", f"{'beside it':<24}{'seconds':>10}{'behind training':>18}{'waited for':>13}"]
    for track in tracks:
        busy = merged([span for span in spans if span.track == track])
        hidden_s, waited_s = length_s(common(busy, training)), length_s(common(busy, waiting))
        share = hidden_s / length_s(busy)
        lines.append(f"{track:<24}{length_s(busy):>10.3f}{hidden_s:>10.3f} ({share:>4.0%}){waited_s:>14.3f}")
    return "\n".join([*lines, "(behind training: during reference and update; waited for: during decode and rollout)"])


def operator_table(averages: Any) -> str:
    """What took the most time by itself: of the GPU's kernels, or of the operators where no kernel was recorded.

    On a GPU none is if another program listens to it already.
    """
    averages = [one for one in averages if not one.is_user_annotation]
    on_gpu = any(one.device_type != DeviceType.CPU for one in averages)
    rows = [
        (one.key, one.count, (one.self_device_time_total if on_gpu else one.self_cpu_time_total) / 1e6)
        for one in averages
        if (one.device_type != DeviceType.CPU) == on_gpu
    ]
    rows.sort(key=lambda row: -row[2])
    total_s = sum(took for _, _, took in rows)
    rows = [*rows[:NUM_ROWS], ("all", sum(count for _, count, _ in rows), total_s)]
    lines = [f"{'kernel' if on_gpu else 'operator, by itself':<60}{'calls':>8}{'seconds':>10}{'share':>9}"]
    lines += [f"{key[:58]:<60}{count:>8}{took:>10.3f}{took / total_s:>9.1%}" for key, count, took in rows]
    return "\n".join(lines)


def merged(spans: Sequence[Span]) -> list[Span]:
    """The same time without overlaps, in order."""
    result: list[Span] = []
    for span in sorted(spans, key=lambda one: one.start_ns):
        if result and span.start_ns <= result[-1].end_ns:
            last = result.pop()
            span = Span(last.name, last.track, last.start_ns, max(last.end_ns, span.end_ns))
        result.append(span)
    return result


def common(left: Sequence[Span], right: Sequence[Span]) -> list[Span]:
    """The time that lies in both, each without overlaps."""
    return [both for span in left for one in right if (both := _clipped(span, one.start_ns, one.end_ns)) is not None]


def length_s(spans: Sequence[Span]) -> float:
    """Seconds, of spans without overlaps."""
    return sum(span.end_ns - span.start_ns for span in spans) / 1e9


def _clipped(span: Span, start_ns: int, end_ns: int) -> Span | None:
    start_ns, end_ns = max(span.start_ns, start_ns), min(span.end_ns, end_ns)
    return Span(span.name, span.track, start_ns, end_ns) if start_ns < end_ns else None


def _write_trace(profiler: profile, spans: Sequence[Span], path: Path) -> None:
    """The profiler's trace with the spans as a process of their own in front, a track each.

    The text is completed while it is copied: a step on GPUs has millions of events, which need not be held as objects.
    """
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(plain))
        with plain.open(encoding="utf-8") as source, gzip.open(path, "wt", encoding="utf-8", compresslevel=3) as target:
            base_ns = 0
            for line in source:
                if '"baseTimeNanoseconds":' in line:
                    base_ns = int(line.split(":")[1].strip(" ,\n"))
                target.write(line)
                if line.strip() == _EVENTS_START:
                    target.writelines(json.dumps(event) + ",\n" for event in _events(spans, base_ns))
                    break
            target.writelines(source)


def _events(spans: Sequence[Span], base_ns: int) -> Iterator[dict[str, Any]]:
    process = "phases, and what runs beside them"
    yield {"ph": "M", "name": "process_sort_index", "pid": process, "tid": 0, "args": {"sort_index": -1}}
    for span in spans:
        yield {
            "ph": "X",
            "cat": "span",
            "name": span.name,
            "pid": process,
            "tid": span.track,
            "ts": (span.start_ns - base_ns) / 1e3,  # microseconds
            "dur": (span.end_ns - span.start_ns) / 1e3,
        }
